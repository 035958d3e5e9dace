import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from insitu import Model, NoValueError, OperationError, ShapeError

X = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])

EXPRESSIONS = {
    "operators": lambda x: (1 - x) * 2 / (x + 3) ** 2 % 5 // 1 - (-x),
    "reflected": lambda x: 2**x + 3 * x - 1 / x + 7 // x + 7 % x,
    "tensor on the left": lambda x: torch.ones(3) - x + torch.ones(2, 3) @ x.T @ X,
    "comparisons": lambda x: (x > 0) & (x <= 4) | (x == 5) ^ (x != 1),
    "abs, neg, invert": lambda x: abs(x) + (+x) + (~(x > 0)).float(),
    "indexing": lambda x: x[:, -1] + x[0, 1:][None, :1].flatten()[0],
    "indexing by a value": lambda x: x[x > 0],
    "indexing by a slice of values": lambda x: x[:, x.long()[0, 0] :],
    "a constant indexed by a value": lambda x: X[:, x.argmax(-1)],
    "methods": lambda x: x.mean(-1, keepdim=True).expand(2, 3).contiguous().view(-1).sum(),
    "functions": lambda x: torch.softmax(x, -1) + torch.where(x > 0, x, torch.zeros(())),
    "functional": lambda x: F.gelu(x) + F.layer_norm(x, (3,)) + F.normalize(x, dim=-1),
    "lists of values": lambda x: torch.cat([x, x + 1], dim=-1) + torch.stack([x, x]).sum(),
    "lists without keywords": lambda x: torch.cat([x, x], 0),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "named results": lambda x: x.max(-1).values + x.topk(2).indices.sum() + torch.sort(x)[0][:, 0],
    "split": lambda x: x.split(2, -1)[1] + torch.chunk(x, 3, dim=-1)[0],
    "properties": lambda x: x.T @ x.mT.T,
    "dtypes and devices": lambda x: x.to(torch.float64).to(x.device).half().float(),
    "numbers": lambda x: x.sum().item() * x,
    "linalg": lambda x: torch.linalg.norm(x) + torch.linalg.svd(x).S.sum(),
    "fields of results": lambda x: (
        torch.linalg.eigh(x.T @ x).eigenvectors.abs() @ torch.linalg.svd(x).Vh.abs()
    ),
    "distributions": lambda x: torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=x, validate_args=False),
        torch.distributions.Categorical(probs=x.flip(-1).softmax(-1), validate_args=False),
    ),
    "NumPy numbers": lambda x: np.float32(2) * x + x * np.int64(3),
    "nested arguments": lambda x: F.pad(x, (1, 1)) + torch.full((2, 5), 3.0),
}


def identity() -> Model:
    return Model(nn.Sequential(nn.Identity(), nn.Identity()))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_what_is_recorded_is_what_torch_computes(name: str) -> None:
    expression = EXPRESSIONS[name]
    model = identity()
    with model.trace(X):
        saved = expression(model[0].output).save()
    expected = expression(X)
    assert type(saved.value) is type(expected)
    assert torch.equal(torch.as_tensor(saved.value), torch.as_tensor(expected))


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_saved_value_takes_the_same_operations_after_the_run(name: str) -> None:
    expression = EXPRESSIONS[name]
    model = identity()
    with model.trace(X):
        saved = model[0].output.save()
    computed, expected = expression(saved), expression(X)
    assert torch.equal(torch.as_tensor(computed), torch.as_tensor(expected))


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, True) for name in EXPRESSIONS if name not in ("numbers", "NumPy numbers")],
)
def test_shapes_while_recording_are_those_of_the_run(name: str, shape: bool) -> None:
    model = identity()
    with model.trace(X):
        proxy = EXPRESSIONS[name](model[0].output)
        if name in ("indexing by a value", "indexing by a slice of values"):
            with pytest.raises(ShapeError, match="depends on values"):
                _ = proxy.shape
            return
        inferred = proxy.shape, proxy.dtype, proxy.ndim, proxy.dim(), proxy.numel(), proxy.size()
        again = proxy.ndimension(), proxy.nelement(), proxy.is_floating_point(), proxy.is_complex()
        last = proxy.size(-1) if proxy.ndim else None
    value = EXPRESSIONS[name](X)
    assert inferred == (
        *(value.shape, value.dtype, value.ndim),
        *(value.dim(), value.numel(), value.size()),
    )
    assert again == (value.ndim, value.numel(), value.is_floating_point(), value.is_complex())
    assert last == (value.size(-1) if value.ndim else None)


@pytest.mark.parametrize(
    "asked", ["ndim", "dim", "ndimension", "numel", "nelement", "size", "is_floating_point"]
)
def test_a_tuple_has_no_axes_of_its_own(asked: str) -> None:
    model = identity()
    with model.trace((X, X)), pytest.raises(OperationError, match=r"is a tuple.*output\[0\]"):
        found = getattr(model[0].output, asked)
        found()


def test_a_distribution_that_checks_values_says_what_to_write() -> None:
    model = identity()
    with model.trace(X), pytest.raises(OperationError, match="validate_args=False"):
        torch.distributions.Categorical(logits=model[0].output, validate_args=True)


def test_length_and_iteration_follow_the_shape() -> None:
    model = identity()
    with model.trace(X):
        h = model[0].output
        assert len(h) == 2
        first, second = h
        total = sum(row.sum() for row in h).save()
        first = first.save()
    assert torch.equal(first, X[0])
    assert torch.equal(total, X.sum())


def test_a_proxy_prints_as_its_expression_with_its_shape_once_known() -> None:
    model = identity()
    with model.trace(X):
        h = model[0].output
        e = (h[:, -1:].mean(-1, keepdim=True) + 1).softmax(dim=-1)
        assert repr(e) == "([0].output[:, -1:].mean(-1, keepdim=True) + 1).softmax(dim=-1)"
        assert repr(h) == "[0].output"
        _ = h.shape
        assert f"{h}" == "[0].output: torch.Size([2, 3])"
        saved = h.save()
    assert repr(saved) == repr(X)
    assert f"{saved.sum():.1f}" == f"{X.sum():.1f}"


def test_a_saved_proxy_stands_for_its_value_after_the_run() -> None:
    model = identity()
    with model.trace(X):
        h = model[0].output.save()
        n = h.sum().item().save()
        flag = (h.sum() > 0).save()
    assert torch.equal(torch.sum(h), X.sum())
    assert h.shape == X.shape and len(h) == 2 and h.device == X.device
    assert [row.tolist() for row in h] == X.tolist()
    assert np.array_equal(np.asarray(h), X.numpy())
    assert float(n) == X.sum().item() and int(n) == 5 and bool(flag)
    assert range(10)[flag.long()] == 1
    assert h.requires_grad is False


def test_a_saved_proxy_is_a_constant_in_a_later_block() -> None:
    model = identity()
    with model.trace(X):
        old = model[0].output.save()
    with model.trace(X * 2):
        new = model[0].output
        results = [(new - old).save(), (old - new).save(), torch.cat([old, new]).save()]
    assert torch.equal(results[0], X)
    assert torch.equal(results[1], -X)
    assert torch.equal(results[2], torch.cat([X, X * 2]))


def test_save_can_be_called_on_its_own_and_more_than_once() -> None:
    model = identity()
    with model.trace(X):
        h = model[0].output
        h.save()
        again = h.save()
    assert torch.equal(h.value, X) and torch.equal(again.value, X)


def test_a_saved_value_is_a_copy() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.zero_()

    model = Model(nn.Sequential(nn.Identity(), Writes()))
    with model.trace(X.clone()):
        before = model[0].output.save()
        after = model[1].output.save()
    assert torch.equal(before, X)
    assert torch.equal(after, torch.zeros_like(X))


def test_a_value_that_waits_is_not_changed_by_the_model() -> None:
    model = Model(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Identity()))
    with model.trace(X.clone()):
        change = (model[2].output - model[0].output).save()
        view = (model[2].output[0] - model[0].output[0]).save()
    assert torch.equal(change, X.relu() - X)
    assert torch.equal(view, X[0].relu() - X[0])


REFUSED = {
    "if": (lambda h: 1 if h else 2, "torch.where"),
    "float": (float, ".item()"),
    "int": (int, ".item()"),
    "index": (lambda h: [1, 2][h], "tensor index"),
    "in": (lambda h: 1.0 in h, "any()"),
    "numpy": (np.asarray, "NumPy array"),
    "value": (lambda h: h.value, "no value yet"),
    "uninitialised": (torch.empty_like, "empty_like"),
    "unknown method": (lambda h: h.maen(), "'mean'"),
    "into a constant": (lambda h: torch.zeros(3).add_(h), "value of this run"),
    "out": (lambda h: torch.add(h, 1, out=torch.empty(2, 3)), "out="),
    "item deletion": (lambda h: operator.delitem(h, 0), "not recorded"),
    "object": (lambda h: h + object(), "object"),
    "function": (lambda h: h + print, "a function"),
    "array": (lambda h: h + np.ones(3), "numpy.ndarray"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused_at_its_line(name: str) -> None:
    action, words = REFUSED[name]
    model = identity()
    with pytest.raises((OperationError, NoValueError)) as caught, model.trace(X):
        action(model[0].output)
    message = str(caught.value)
    assert words.replace("\\", "").strip("`") in message.replace("\\", "")
    assert __file__ in message


def test_a_tensor_operation_on_a_tuple_says_to_index_it(gpt2) -> None:
    for use in (
        lambda block: block.mean(),
        lambda block: block + 1,
        lambda block: 1 + block,
        lambda block: block[0] + block,
        torch.sum,
        lambda block: torch.cat([block, block]),
        lambda block: torch.add(torch.ones(1), block),
    ):
        with pytest.raises(OperationError, match=r"h\[1\]\.output\[0\]"), gpt2.trace([1, 2]):
            use(gpt2.transformer.h[1].output)


def test_shapes_that_do_not_fit_are_an_error_at_the_users_line_when_asked_for() -> None:
    model = identity()
    with pytest.raises(ShapeError) as caught, model.trace(X):
        product = model[0].output @ model[0].output  # the line to find
        _ = product.shape
    assert "the line to find" in str(caught.value) and "(2, 3), (2, 3)" in str(caught.value)


def test_shapes_that_do_not_fit_are_an_error_at_the_users_line_in_the_run() -> None:
    model = identity()
    with pytest.raises(ShapeError) as caught, model.trace(X):
        _ = model[0].output @ model[0].output  # the line to find
    assert "the line to find" in str(caught.value) and "(2, 3), (2, 3)" in str(caught.value)


def test_what_a_notebook_asks_of_a_proxy_is_not_recorded() -> None:
    model = identity()
    with model.trace(X) as tracer:
        h = model[0].output
        assert not hasattr(h, "_repr_html_") and not hasattr(h, "__array_interface__")
        assert len(tracer.graph) == 1


def test_a_proxy_can_be_a_dictionary_key() -> None:
    model = identity()
    with model.trace(X):
        h = model[0].output
        assert {h: "h"}[h] == "h"
