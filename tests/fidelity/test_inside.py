"""Inside a forward, against the same forward written out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from insitu import (
    BlockError,
    CausalityError,
    IndexOutOfRangeError,
    LanguageModel,
    Model,
    NeverRanError,
    PathError,
)
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.test_writing import IDS, logits


def eager(module: Any) -> LanguageModel:
    module.set_attn_implementation("eager")
    return LanguageModel(module)


@pytest.fixture
def gpt2() -> LanguageModel:
    return eager(tiny_gpt2())


def attention_by_hand(
    module: Any, layer: int, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPT-2's scores before the softmax, and the pattern, from the input of the attention."""
    kept: list[torch.Tensor] = []
    attention = module.transformer.h[layer].attn
    handle = attention.c_attn.register_forward_hook(lambda m, a, out: kept.append(out.clone()))
    with torch.no_grad():
        module(ids, use_cache=False)
    handle.remove()
    query, key, _ = kept[0].split(16, 2)
    query, key = (x.view(1, -1, 4, 4).transpose(1, 2) for x in (query, key))
    scores = query @ key.mT / math.sqrt(4)
    mask = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    return scores, scores.softmax(-1)


def test_the_attention_pattern_is_a_site(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        softmax = gpt2.transformer.h[1].attn.ops.softmax[0]
        pattern = softmax.output
        assert pattern.shape == (1, 4, 6, 6)
        pattern, scores = pattern.save(), softmax.input.save()
        keywords = softmax.inputs[1].save()
    expected_scores, expected = attention_by_hand(gpt2.module, 1, IDS)
    seen = torch.ones(6, 6).tril().bool()
    assert torch.allclose(scores.value[..., seen], expected_scores[..., seen], atol=1e-6)
    assert torch.allclose(pattern.value, expected, atol=1e-6)
    assert keywords.value["dim"] == -1


def test_the_attention_pattern_can_be_written(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        pattern = gpt2.transformer.h[1].attn.ops.softmax[0].output
        pattern[:, 2] = 0
        written = gpt2.lm_head.output.save()
    with gpt2.trace(IDS):
        softmax = gpt2.transformer.h[1].attn.ops.softmax[0]
        keep = torch.ones(1, 4, 1, 1)
        keep[:, 2] = 0
        softmax.output = softmax.output * keep
        assigned = gpt2.lm_head.output.save()

    def without_head(output: torch.Tensor) -> torch.Tensor:
        return output

    attention = gpt2.module.transformer.h[1].attn

    def hook(module: nn.Module, args: Any) -> Any:
        merged = args[0].clone()
        merged[..., 8:12] = 0  # the third head's part, before the output projection
        return (merged,)

    handle = attention.c_proj.register_forward_pre_hook(hook)
    expected = logits(gpt2, {"transformer.h.1": without_head}, IDS)
    handle.remove()
    assert torch.allclose(written.value, expected, atol=1e-6)
    assert torch.allclose(assigned.value, expected, atol=1e-6)
    assert not torch.allclose(expected, logits(gpt2, {}, IDS), atol=1e-4)
    parts = list(gpt2.module.modules())
    assert not any("forward" in vars(p) or "_call_impl" in vars(p) for p in parts)


def test_the_input_of_a_function_can_be_written(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        softmax = gpt2.transformer.h[1].attn.ops.softmax[0]
        softmax.input = softmax.input.masked_fill(torch.eye(6).bool(), -1e9)
        pattern = softmax.output.save()
    scores, _ = attention_by_hand(gpt2.module, 1, IDS)
    expected = scores.masked_fill(torch.eye(6).bool(), -1e9).softmax(-1)
    assert torch.allclose(pattern.value[:, :, 1:], expected[:, :, 1:], atol=1e-6)


def test_rotated_queries_and_keys_of_a_llama() -> None:
    llama = eager(tiny_llama())
    with llama.trace(IDS):
        attention = llama.model.layers[1].self_attn
        names = [called.name for called in attention.ops]
        query, key = attention.ops.matmul[0].inputs[0][0], attention.ops.matmul[0].inputs[0][1]
        query, key = query.save(), key.save()
        projected = attention.q_proj.output.save()
    assert names.count("matmul") == 2 and "linear" not in names  # that is the projections' own
    heads = projected.value.view(1, 6, 4, 4).transpose(1, 2)
    with torch.no_grad():
        angles = torch.arange(6)[:, None] / (10000 ** (torch.arange(0, 4, 2) / 4))
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        rotated = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
        expected = heads * cos + rotated * sin
    assert torch.allclose(query.value, expected, atol=1e-5)
    assert key.value.shape == (1, 4, 4, 6)


def test_functions_are_listed_in_their_order_with_shapes(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        listed = repr(gpt2.transformer.h[0].attn.ops)
        assert "softmax[0]: torch.Size([1, 4, 6, 6])" in listed.splitlines()
        assert listed.index("matmul[0]") < listed.index("softmax[0]") < listed.index("matmul[1]")
        assert len(gpt2.transformer.h[0].attn.ops.matmul) == 2
        assert "softmax" in dir(gpt2.transformer.h[0].attn.ops)
        gpt2.lm_head.output.save()


class Own(nn.Module):
    """Calls torch functions around a module that calls the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Softmax(-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.softmax(x, -1)
        return torch.softmax(self.inner(first) + x, -1) * 2


def test_only_the_modules_own_calls_count() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    model = Model(Own())
    with model.trace(x):
        first, second = (calls.output.save() for calls in model.ops.softmax)
        last = model.ops.softmax[-1].input.save()
        inner = model.inner.ops.softmax[0].output.save()
        total = model.inner.output.sum() + model.ops.add[0].output.sum()
        total = total.save()
    a = x.softmax(-1)
    b = a.softmax(-1)
    assert torch.equal(first, a) and torch.equal(inner, b)
    assert torch.equal(last, b + x) and torch.equal(second, (b + x).softmax(-1))
    assert torch.equal(total, b.sum() + (b + x).sum())


def test_a_write_inside_reaches_what_comes_after_and_stays_in_order() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    model = Model(Own())
    with model.trace(x) as tracer:
        model.ops.softmax[1].output = model.ops.softmax[0].output
        result = tracer.output.save()
    assert torch.equal(result, x.softmax(-1) * 2)
    with pytest.raises(CausalityError, match=r"softmax\[0\]"), model.trace(x):
        model.ops.softmax[0].output = model.ops.softmax[1].output


def test_gradients_inside_a_forward(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        pattern = gpt2.transformer.h[3].attn.ops.softmax[0].output
        grad = pattern.grad.save()
        gpt2.lm_head.output[:, -1, 5].sum().backward()
    assert grad.value.shape == (1, 4, 6, 6) and grad.value[:, :, -1].abs().sum() > 0
    assert grad.value[:, :, :-1].abs().sum() == 0  # the last position sees only its own row


def test_steps_inside_a_forward(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=3, eos_token_id=None) as generator:
        with generator.every_step():
            patterns = gpt2.transformer.h[0].attn.ops.softmax[0].output.save()
    assert [tuple(pattern.shape[-2:]) for pattern in patterns.value] == [(6, 6), (1, 7), (1, 8)]


def test_mistakes_are_reported_at_their_line(gpt2: LanguageModel) -> None:
    with pytest.raises(PathError, match="calls no 'softmux'.*'softmax'"), gpt2.trace(IDS):
        gpt2.transformer.h[0].attn.ops.softmux[0].output.save()
    with pytest.raises(IndexOutOfRangeError, match="called 1 times"), gpt2.trace(IDS):
        gpt2.transformer.h[0].attn.ops.softmax[3].output.save()
    with pytest.raises(BlockError):
        print(gpt2.transformer.h[0].attn.ops)
    with pytest.raises(NeverRanError, match=r"softmax\[0\].*skip") as caught, gpt2.trace(IDS):
        attention = gpt2.transformer.h[0].attn
        attention.skip((attention.input, None))
        attention.ops.softmax[0].output.save()  # the line to find
    assert "the line to find" in str(caught.value)


def test_what_a_part_calls_is_not_its_owners_where_its_output_is_read_too() -> None:
    """A part whose output is asked for is called in another way than one that is not."""

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(x, 10)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.add(self.part(x), 100)

    model = Model(Whole())
    with model.trace(torch.zeros(2)):
        inner = model.part.output.save()
        outer = model.ops.add[0].output.save()
        within = model.part.ops.add[0].output.save()
    assert inner.tolist() == within.tolist() == [10, 10]
    assert outer.tolist() == [110, 110]
    with model.trace(torch.zeros(2)):
        model.part.output[:] = 1
        outer = model.ops.add[0].output.save()
    assert outer.tolist() == [101, 101]


def logits_with(module: Any, ids: torch.Tensor, *hooks: tuple[nn.Module, Any]) -> torch.Tensor:
    """The logits of a model with hooks: before a module if they take two arguments."""
    handles = [
        part.register_forward_hook(hook)
        if hook.__code__.co_argcount == 3
        else part.register_forward_pre_hook(hook)
        for part, hook in hooks
    ]
    with torch.no_grad():
        found = module(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("layer", [1, 2])
def test_a_value_between_modules_is_there_for_modules_that_come_after(
    gpt2: LanguageModel, layer: int
) -> None:
    module: Any = gpt2.module
    h, kept = module.transformer.h, list[torch.Tensor]()
    with gpt2.trace(IDS):
        gpt2.blocks[layer].mlp_out += gpt2.blocks[1].residual_mid
        found = gpt2.logits.save()
    expected = logits_with(
        module,
        IDS,
        (h[1].ln_2, lambda part, args: kept.append(args[0])),
        (h[layer].mlp, lambda part, args, out: out + kept[0]),
    )
    assert torch.allclose(found.value, expected, atol=1e-5)


def test_a_value_inside_of_a_forward_is_there_for_a_module_in_it(gpt2: LanguageModel) -> None:
    module: Any = gpt2.module
    attn, kept = module.transformer.h[1].attn, list[torch.Tensor]()
    with gpt2.trace(IDS):
        attention = gpt2.blocks[1].attention
        attention.z += attention.q
        found = gpt2.logits.save()
    expected = logits_with(
        module,
        IDS,
        (attn.c_attn, lambda part, args, out: kept.append(out[..., :16].clone())),
        (attn.c_proj, lambda part, args: args[0] + kept[0]),
    )
    assert torch.allclose(found.value, expected, atol=1e-5)


def test_a_module_is_skipped_with_a_value_between_modules(gpt2: LanguageModel) -> None:
    module: Any = gpt2.module
    h, kept = module.transformer.h, list[torch.Tensor]()
    with gpt2.trace(IDS):
        h_2 = gpt2.transformer.h[2]
        h_2.mlp.skip(gpt2.blocks[1].residual_mid)
        found = gpt2.logits.save()
    expected = logits_with(
        module,
        IDS,
        (h[1].ln_2, lambda part, args: kept.append(args[0])),
        (h[2].mlp, lambda part, args, out: kept[0]),
    )
    assert torch.allclose(found.value, expected, atol=1e-5)


def test_what_comes_later_is_refused_before_the_model_runs(gpt2: LanguageModel) -> None:
    ran: list[int] = []
    gpt2.module.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(CausalityError, match=r"h\[2\]\.ops\.add\[0\]\.output"), gpt2.trace(IDS):
        gpt2.blocks[1].mlp_out += gpt2.blocks[2].residual_mid
    with (
        pytest.raises(NeverRanError, match=r"the run ends after `transformer\.h\[1\]`"),
        gpt2.trace(IDS),
    ):
        gpt2.transformer.h[1].stop()
        gpt2.blocks[2].residual_mid.save()
    assert not ran


def test_a_plan_ends_where_a_value_between_modules_is_read(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        gpt2.blocks[0].residual_mid.save()
    assert [single.run for single in tracer.plan.passes] == [1]
