"""Tensors of the user's own are what they are at the line that uses them, as in plain PyTorch.

The oracle is a hook that writes at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

from insitu import BlockError, LanguageModel, Model, OperationError, cond
from tests.conftest import tiny_gpt2

SMALL = 2**20  # up to so many bytes a tensor is copied
X = torch.tensor([[1.0, 2.0, 3.0]])
VALUES = [torch.tensor([float(k), 2.0 * k, -k]) for k in range(3)]


def linear() -> Model:
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def with_hook(model: Model, value: torch.Tensor) -> torch.Tensor:
    handle = model.module[0].register_forward_hook(lambda *_: value.clone().expand(1, 3))
    with torch.no_grad():
        found = model.module(X)
    handle.remove()
    return found


def filled() -> Any:
    """A tensor that is filled anew for each line."""
    own = torch.zeros(3)

    def fill(value: torch.Tensor) -> torch.Tensor:
        return own.copy_(value)

    return fill


def shared_with_numpy() -> Any:
    array = np.zeros(3, dtype="float32")
    own = torch.from_numpy(array)

    def fill(value: torch.Tensor) -> torch.Tensor:
        array[:] = value.numpy()  # which PyTorch does not see
        return own

    return fill


def view_of_one() -> Any:
    whole = torch.zeros(2, 3)

    def fill(value: torch.Tensor) -> torch.Tensor:
        whole[1] = value
        return whole[1]

    return fill


WRITES: dict[str, Callable[[Any, torch.Tensor], None]] = {
    "assigned": lambda site, own: setattr(site, "output", site.output * 0 + own),
    "assigned whole": lambda site, own: setattr(site, "output", own.expand(1, 3)),
    "in place": lambda site, own: site.output.__setitem__(slice(None), own),
    "a method": lambda site, own: setattr(site, "output", site.output.mul(0).add(own)),
    "a keyword": lambda site, own: setattr(
        site, "output", torch.add(input=site.output * 0, other=own)
    ),
    "in a list": lambda site, own: setattr(
        site, "output", torch.stack([site.output[0] * 0, own]).sum(0, keepdim=True)
    ),
    "reflected": lambda site, own: setattr(site, "output", own + site.output * 0),
    "in a branch": lambda site, own: setattr(
        site,
        "output",
        cond(site.output.sum() > -1e9, lambda x: x * 0 + own, lambda x: x, site.output),
    ),
}  # fmt: skip


@pytest.mark.parametrize("filling", [filled, shared_with_numpy, view_of_one])
@pytest.mark.parametrize("way", WRITES)
def test_a_tensor_that_is_filled_anew_counts_as_it_is_at_each_line(way: str, filling: Any) -> None:
    model, fill, found = linear(), filling(), []
    with model.trace() as tracer:
        for value in VALUES:
            with tracer.invoke(X):
                WRITES[way](model[0], fill(value))
                found.append(model.output.save())
    for value, one in zip(VALUES, found, strict=True):
        torch.testing.assert_close(one, with_hook(model, value))


def test_an_index_that_is_filled_anew() -> None:
    model, index, found = linear(), torch.tensor([0]), []
    with torch.no_grad():
        expected = model.module[0](X)
    with model.trace(X):
        for place in range(3):
            index[0] = place
            found += [model[0].output[:, index].save(), model[0].output[0][index].save()]
    for place in range(3):
        assert found[2 * place].item() == found[2 * place + 1].item() == expected[0, place].item()


def test_a_saved_value_and_a_prompt_that_are_filled_anew() -> None:
    model = linear()
    with model.trace(X):
        saved = model[0].output.save()
    kept, own = saved.clone(), X.clone()
    with model.trace(own):
        model[0].output[:] = saved
        saved.zero_()
        own.zero_()
        given, written = model.input.save(), model[0].output.save()
    assert torch.equal(given, X) and torch.equal(written, kept)


def test_embeddings_of_a_prompt_that_are_filled_anew() -> None:
    model, found = LanguageModel(tiny_gpt2()), []
    width = model.module.config.n_embd
    own = torch.zeros(1, 3, width)
    with model.trace() as tracer:
        for k in range(3):
            own.fill_(k)
            with tracer.invoke(inputs_embeds=own):
                found.append(model.logits.save())
    for k, one in enumerate(found):
        with torch.no_grad():
            expected = model.module(inputs_embeds=torch.full((1, 3, width), float(k))).logits
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)


def test_an_edit_has_tensors_of_its_own() -> None:
    model = linear()
    small, large = VALUES[1].clone(), torch.zeros(SMALL // 4 + 3)
    with model.edit() as edited:
        edited[0].output = edited[0].output * 0 + small + large[-3:] + large.sum()
    small += 5
    large += 5
    with edited.trace(X):
        found = edited.output.save()
    torch.testing.assert_close(found, with_hook(model, VALUES[1]))


@pytest.mark.no_wire  # the bytes are written before the change
@pytest.mark.parametrize(
    "own", [torch.zeros(3, requires_grad=True), torch.zeros(SMALL // 4 + 1), nn.Parameter(X[0])]
)
def test_one_that_is_held_by_reference_is_refused_at_its_line(own: torch.Tensor) -> None:
    model = linear()
    with pytest.raises(OperationError, match=r"`tensor\.clone\(\)`") as caught:
        with model.trace(X):
            scaled = model[0].output.sum() * own
            scaled.sum().save()
            with torch.no_grad():
                own += 1
    assert "scaled = model[0].output.sum() * own" in str(caught.value)
    with pytest.raises(OperationError, match="was written into after this line"):
        with model.trace(X):
            first = model[0].output.sum() * own
            with torch.no_grad():
                own += 1
            (first + model[0].output.sum() * own).save()
    with model.trace(X):  # the next run is fine
        total = (model[0].output.sum() * own).sum().save()
    with torch.no_grad():
        expected = (model.module[0](X).sum() * own).sum()
    torch.testing.assert_close(total.detach(), expected)


@pytest.mark.no_wire
def test_a_session_looks_at_the_tensors_of_all_its_blocks() -> None:
    model, own = linear(), torch.zeros(3, requires_grad=True)
    with pytest.raises(OperationError, match="was written into after this line"):
        with model.session():
            with model.trace(X):
                first = (model[0].output + own).save()
            with torch.no_grad():
                own += 1
            with model.trace(X):
                model.output.save()
    with pytest.raises(Exception, match="session raised OperationError"):
        _ = first.value


def test_running_statistics_are_written_where_they_are() -> None:
    model, norm, plain = linear(), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    rows = torch.randn(4, 3)
    with model.trace(rows):
        found = norm(model[0].output).save()
    expected = plain(model.module[0](rows))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_running_statistics_are_written_where_they_are_if_a_line_before_reads_them() -> None:
    model, norm, plain = linear(), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    rows = torch.randn(4, 3)
    with model.trace(rows):
        still = norm.eval()(model[0].output).save()
        moved = norm.train()(model[0].output).save()
    hidden = model.module[0](rows)
    torch.testing.assert_close(still, plain.eval()(hidden))
    torch.testing.assert_close(moved, plain.train()(hidden))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_running_statistics_of_an_edit_are_written_where_they_are() -> None:
    model, rows = linear(), torch.randn(4, 3)
    mean, variance = torch.zeros(3), torch.ones(3)
    plain = nn.BatchNorm1d(3)
    with model.edit() as edited:
        edited[0].output = batch_norm(edited[0].output, mean, variance, training=True)
    for _ in range(2):
        with edited.trace(rows):
            found = edited[0].output.save()
        torch.testing.assert_close(found, plain(model.module[0](rows)))
    torch.testing.assert_close(mean, plain.running_mean)


@pytest.mark.no_wire  # the bytes are written before the change
def test_a_tensor_that_the_run_writes_into_is_not_written_by_another_line() -> None:
    model, mean, variance = linear(), torch.zeros(3), torch.ones(3)
    with pytest.raises(OperationError, match="was written into after this line"):
        with model.trace(torch.randn(4, 3)):
            batch_norm(model[0].output, mean, variance, training=True).save()
            mean += 1


@pytest.mark.parametrize("large", [False, True])
def test_a_tensor_of_inference_mode_is_a_constant_and_a_prompt(large: bool) -> None:
    model = linear()
    with torch.inference_mode():
        own = torch.ones(SMALL // 4 + 1 if large else 2, 3)
    with model.trace() as tracer, tracer.invoke(own):
        found = (model.output + own).save()
    with torch.no_grad():
        torch.testing.assert_close(found, model.module(own) + own)


def large_of_numpy() -> tuple[torch.Tensor, Any]:
    array = np.zeros((SMALL, 3), dtype="float32")
    return torch.from_numpy(array), array


def large_of_inference_mode() -> tuple[torch.Tensor, Any]:
    with torch.inference_mode():
        own = torch.zeros(SMALL, 3)
    return own, own.numpy()


@pytest.mark.no_wire  # the bytes are written before the change
@pytest.mark.parametrize("make", [large_of_numpy, large_of_inference_mode])
def test_a_large_one_is_looked_at_where_nobody_counts_what_is_written(make: Any) -> None:
    model, (own, array) = linear(), make()
    with model.trace(X):
        same = [(model[0].output + own).save() for _ in range(2)]
    with torch.no_grad():
        plain = model.module[0](X) + own
    for one in same:
        torch.testing.assert_close(one.value, plain)
    line = r"(?s)was written into after this line.*model\[0\]\.output \+ own"
    with pytest.raises(OperationError, match=line):  # before another line uses it
        with model.trace(X):
            (model[0].output + own).save()
            array += 1
            (model[0].output * own).save()
    with pytest.raises(OperationError, match=line):  # before the run
        with model.trace(X):
            (model[0].output + own).save()
            array += 1


@pytest.mark.no_wire
def test_a_sparse_one_is_held_by_its_count_of_writes() -> None:
    model, own = linear(), torch.eye(3).to_sparse()
    with pytest.raises(OperationError, match="was written into after this line"):
        with model.trace(X):
            torch.mm(own, model[0].output.T).save()
            own.mul_(2)


@pytest.mark.no_wire  # a sparse tensor does not travel
def test_one_that_nothing_tells_writes_of_is_as_it_was_at_its_line() -> None:
    model = linear()
    with torch.inference_mode():
        own = torch.eye(3).to_sparse()
    with model.trace(X):
        found = torch.mm(own, model[0].output.T).save()
        with torch.inference_mode():
            own.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(found.value, model.module[0](X).T)


@pytest.mark.no_wire
@pytest.mark.parametrize("in_session", [True, False])
def test_an_optimiser_does_not_step_before_its_gradients(in_session: bool) -> None:
    model, own = linear(), torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.SGD([own], lr=0.1)
    line = r"(?s)backward pass of this line.*output\.sum\(\)\.backward\(\)"
    if in_session:
        with pytest.raises(BlockError, match=line), model.session():
            with model.trace(X):
                model[0].output = model[0].output + own
                model.output.sum().backward()
            optimiser.step()
    else:
        with pytest.raises(BlockError, match=line), model.trace(X):
            model[0].output = model[0].output + own
            model.output.sum().backward()
            optimiser.step()
    assert own.grad is None
    with model.trace(X):
        model[0].output = model[0].output + own
        model.output.sum().backward()
    optimiser.step()  # now they are there
    torch.testing.assert_close(own.detach(), -0.1 * model.module[1].weight.sum(0).detach())


@pytest.mark.no_wire
def test_an_optimiser_of_what_a_tensor_was_computed_of_does_not_step_before() -> None:
    model = linear()
    rotation = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3, bias=False))
    before = rotation.weight.detach().clone()
    with pytest.raises(BlockError, match="backward pass of this line"), model.trace(X):
        model[0].output = rotation(model[0].output)
        model.output.sum().backward()
        torch.optim.SGD(rotation.parameters(), lr=0.1).step()
    assert torch.equal(rotation.weight, before)


@pytest.mark.no_wire
def test_an_optimiser_of_something_else_steps_at_any_time() -> None:
    model, own, other = linear(), torch.zeros(3, requires_grad=True), torch.ones(3)
    other.requires_grad_()
    other.sum().backward()
    with model.trace(X):
        model[0].output = model[0].output + own
        model.output.sum().backward()
        torch.optim.SGD([other], lr=0.5).step()
    assert torch.equal(other, torch.full((3,), 0.5))
    assert own.grad is not None
