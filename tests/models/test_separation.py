from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from insitu import CausalityError, LanguageModel
from insitu.engine.probe import Call, Probe, probe
from insitu.models.trial import alike
from tests.around import Around
from tests.conftest import hooked_hidden, tiny_gpt2
from tests.fidelity.architectures import spread_out, tiny_mixtral

pytestmark = pytest.mark.no_wire  # it counts passes

RAGGED = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


def read(model: LanguageModel, *sites: Callable[[], object]) -> tuple[list[list[object]], int]:
    """What invocations read, and in how many passes."""
    with model.trace() as tracer:
        saved = []
        for row in RAGGED:
            with tracer.invoke(row):
                saved.append([site().save() for site in sites])
    return [[proxy.value for proxy in own] for own in saved], len(tracer.plan.passes)


def read_alone(model: LanguageModel, site: Callable[[], object]) -> list[object]:
    values = []
    for row in RAGGED:
        with model.trace(row):
            saved = site().save()
        values.append(saved.value)
    return values


class Mixing(nn.Module):
    """Takes from each row what all rows have in common."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x - x.mean(0, keepdim=True) if x.shape[0] > 1 else x


def test_what_depends_on_other_rows_is_not_cut_out_of_a_batch() -> None:
    module = tiny_gpt2()
    module.transformer.h[2].mlp = Mixing(module.transformer.h[2].mlp).eval()
    model = LanguageModel(module)
    _, passes = read(model, lambda: model.transformer.h[1].output[0])
    assert passes == 1
    values, passes = read(model, lambda: model.transformer.h[2].output[0])
    assert passes == len(RAGGED)
    alone = read_alone(model, lambda: model.transformer.h[2].output[0])
    for (mine,), expected in zip(values, alone, strict=True):
        torch.testing.assert_close(mine, expected)


def test_an_expert_that_looks_like_a_batch_is_found_out_by_value() -> None:
    """With one expert for each token there are as many rows as tokens, in another order."""
    torch.manual_seed(0)
    module = tiny_mixtral(experts_per_token=1).eval()
    spread_out(module)
    model = LanguageModel(module)
    paths = [path for path in model.modules if ".experts" in path and path.endswith("act_fn")]
    inside = model
    for name in paths[0].split("."):
        inside = inside[name]
    _, passes = read(model, lambda: model.model.layers[1].output[0])
    assert passes == 1
    if version("transformers").startswith("4."):
        assert len(paths) > len(module.model.layers)
        return  # there is one for each expert here, which not every prompt comes to
    values, passes = read(model, lambda: inside.output)
    assert passes == len(RAGGED)
    for (mine,), expected in zip(values, read_alone(model, lambda: inside.output), strict=True):
        torch.testing.assert_close(mine, expected)


def test_what_cannot_be_cut_is_named_where_one_batch_is_needed() -> None:
    module = tiny_gpt2()
    module.transformer.h[2].mlp = Mixing(module.transformer.h[2].mlp).eval()
    model = LanguageModel(module)
    message = r"`transformer.h\[2\].mlp.output` cannot be cut out of a batch(?s:.*)test_separation"
    with pytest.raises(CausalityError, match=message):
        with model.trace() as tracer:
            with tracer.invoke([5, 6, 7]) as first:
                here = model.transformer.h[0].output[0]
                model.transformer.h[2].mlp.output.save()
            with tracer.invoke([8, 9, 10]):
                model.transformer.h[0].output = here
                there = model.transformer.h[1].output[0]
            with first:
                model.transformer.h[1].output = there


def test_numbers_that_are_none_tell_nothing_against_a_batch() -> None:
    module = tiny_gpt2()
    with torch.no_grad():
        module.transformer.h[2].mlp.c_fc.weight[0, 0] = torch.nan
    model = LanguageModel(module)
    values, passes = read(model, lambda: model.transformer.h[3].output[0])
    assert passes == 1
    assert all(value.isnan().any() for (value,) in values)


class Counting(nn.Module):
    """Counts its calls, in a buffer and in an attribute, and draws a number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(()))
        self.number = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.number += type(x) is torch.Tensor  # and not a fake one
        torch.rand(3)
        return self.inner(x)


def test_finding_out_leaves_no_trace() -> None:
    module = tiny_gpt2()
    module.transformer.h[1].mlp = counting = Counting(module.transformer.h[1].mlp)
    module.eval()
    model = LanguageModel(module)
    torch.manual_seed(3)
    torch.rand(3)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    _, passes = read(model, lambda: model.transformer.h[3].output[0])
    assert passes == 1
    assert torch.equal(torch.get_rng_state(), expected)
    assert counting.calls == 1
    assert counting.number == 1


def test_it_is_found_out_once() -> None:
    module = tiny_gpt2()
    calls: list[int] = []
    forward = module.forward

    def counted(*args: object, **kwargs: object) -> object:
        if type(kwargs["input_ids"]) is torch.Tensor:  # and not a fake one
            calls.append(1)
        return forward(*args, **kwargs)

    module.forward = counted
    model = LanguageModel(module)
    read(model, lambda: model.transformer.h[3].output[0])
    before = len(calls)
    read(model, lambda: model.transformer.h[2].output[0])
    assert len(calls) - before == 1
    with model.edit() as edited:
        model.transformer.h[0].output[0][:] = 0
    before = len(calls)
    read(edited, lambda: edited.transformer.h[2].output[0])
    assert len(calls) - before == 1


def test_a_model_that_fails_on_a_batch_runs_prompts_one_by_one() -> None:
    def single(inner: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1 and type(x) is torch.Tensor:
            raise ValueError("one row, please")
        return inner(x)

    module = tiny_gpt2()
    module.transformer.h[1].mlp = Around(module.transformer.h[1].mlp, single).eval()
    model = LanguageModel(module)
    values, passes = read(model, lambda: model.transformer.h[3].output[0])
    assert passes == len(RAGGED)
    alone = read_alone(model, lambda: model.transformer.h[3].output[0])
    for (mine,), expected in zip(values, alone, strict=True):
        assert torch.equal(mine, expected)


def test_several_rows_of_one_invocation_share_what_is_written() -> None:
    model = LanguageModel(tiny_gpt2())
    prompts = [torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.tensor([[11, 12, 13]])]
    for in_place in (True, False):
        saved = []
        with model.trace() as tracer:
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids):
                    if number == 0 and in_place:
                        model.transformer.wpe.output[:, 1] = 3.0
                    elif number == 0:
                        model.transformer.wpe.output = model.transformer.wpe.output * 2
                    saved.append([model.transformer.wpe.output.save(), model.lm_head.output.save()])
        assert len(tracer.plan.passes) == 1
        for number, ids in enumerate(prompts):
            with model.trace(ids):
                if number == 0 and in_place:
                    model.transformer.wpe.output[:, 1] = 3.0
                elif number == 0:
                    model.transformer.wpe.output = model.transformer.wpe.output * 2
                alone = [model.transformer.wpe.output.save(), model.lm_head.output.save()]
            for mine, expected in zip(saved[number], alone, strict=True):
                assert mine.value.shape == expected.value.shape
                torch.testing.assert_close(mine.value, expected.value)


def test_values_are_alike_to_rounding() -> None:
    x = torch.randn(3, 4)
    assert alike(x, x + 1e-6)
    assert not alike(x, x + 1e-2)
    # How far off a number may be is a share of the largest of them.
    ends = torch.tensor([0.0, -200.0])
    assert alike(ends + torch.tensor([0.019, 0.0]), ends)
    assert not alike(ends + torch.tensor([0.021, 0.0]), ends)
    assert alike(ends.bfloat16() + torch.tensor([5.0, 0.0]).bfloat16(), ends.bfloat16())
    assert not alike(ends.bfloat16() + torch.tensor([7.0, 0.0]).bfloat16(), ends.bfloat16())
    for wrong in (torch.nan, torch.inf):
        assert not alike(torch.tensor([0.0, wrong]), ends)
        assert not alike(ends, torch.tensor([0.0, wrong]))
    assert not alike(x, x[:2])
    assert not alike(x.double(), x)
    assert not alike(x, None)
    assert alike((x, None, 3), (x, None, 3))
    assert not alike((x, None, 3), (x, None, 4))
    assert not alike((x, x), (x,))
    holes = x.clone()
    holes[0, 0] = torch.nan
    holes[0, 1] = -torch.inf
    assert alike(holes, holes.clone())
    assert not alike(holes, x)
    assert not alike(x, holes)
    masked = torch.tensor([0.0, torch.finfo(torch.float32).min, 1.0])
    assert alike(masked, masked.clone())
    assert not alike(masked, torch.tensor([0.0, torch.finfo(torch.float32).min, 1.1]))
    assert alike(torch.zeros(0), torch.zeros(0))
    assert alike(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not alike(torch.tensor([1, 2]), torch.tensor([1, 3]))


def test_a_model_of_few_positions_shares_passes() -> None:
    """It takes none of the lengths that are tried elsewhere."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=100, n_positions=4)
    module = GPT2LMHeadModel(config).eval()
    rows = [[5, 6, 7, 8], [9, 3], [4]]
    model = LanguageModel(module)
    with model.trace() as tracer:
        saved = []
        for row in rows:
            with tracer.invoke(row):
                saved.append(model.blocks[1].block_out.save())
    assert len(tracer.plan.passes) == 1
    for row, found in zip(rows, saved, strict=True):
        expected = hooked_hidden(module, "transformer.h.1", torch.tensor([row]))
        torch.testing.assert_close(found.value, expected)


def test_no_batch_is_tried_on_a_small_model_without_its_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without data a forward of few tokens takes ten times as long."""
    sizes: list[int] = []

    def counted(module: nn.Module, call: Call, *args: Any) -> Probe:
        sizes.append(len(call.kwargs["input_ids"]))
        return probe(module, call, *args)

    monkeypatch.setattr("insitu.models.own_runs.probe", counted)
    model = LanguageModel(tiny_gpt2())
    with model.trace(RAGGED[0]):
        assert model.blocks[1].block_out.shape[1] == 3
    _, passes = read(model, lambda: model.transformer.h[1].output)
    assert passes == 1 and {*sizes} == {1}
