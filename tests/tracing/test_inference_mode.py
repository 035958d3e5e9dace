"""Blocks inside of the user's `torch.inference_mode()` mean what they mean outside of it.

What they give is compared with plain hooks and plain autograd, which run outside.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel, cond, fold
from tests.conftest import hooked_hidden, tiny_gpt2

IDS = torch.tensor([[3, 14, 15, 92, 65]])
Tensor = torch.Tensor


def run(change: Callable[[Tensor], Tensor | None] | None = None, ids: Tensor = IDS) -> Tensor:
    """The logits of a plain model, after a change of the output of its block 1."""
    module = tiny_gpt2()

    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        whole = isinstance(output, Tensor)
        changed = change(output if whole else output[0]) if change else None
        return None if changed is None else changed if whole else (changed, *output[1:])

    module.transformer.h[1].register_forward_hook(hook)
    with torch.no_grad():
        return module(ids).logits


def gradient(ids: Tensor, weight: Tensor, module: Any = None) -> Tensor:
    """The gradient of weighted logits with respect to the output of block 1."""
    module, kept = module or tiny_gpt2(), []

    def hook(part: nn.Module, args: Any, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    handle = module.transformer.h[1].register_forward_hook(hook)
    loss = (module(ids, use_cache=False).logits * weight).sum()
    handle.remove()
    return torch.autograd.grad(loss, kept)[0]


def ordinary(tensor: Tensor) -> bool:
    return not tensor.is_inference()


def test_values_are_ordinary_tensors_and_the_mode_stays_on(gpt2: LanguageModel) -> None:
    with torch.inference_mode():
        with gpt2.trace(IDS.clone()):
            hidden = gpt2.transformer.h[1].output[0]
            assert hidden.shape == (1, 5, 16)
            hidden, logits = hidden.save(), gpt2.lm_head.output.save()
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(hidden.value, hooked_hidden(tiny_gpt2(), "transformer.h.1", IDS))
    assert torch.equal(logits.value, run())
    probe = nn.Linear(16, 1)  # can be trained on what was saved
    probe(hidden.value).sum().backward()
    assert torch.allclose(probe.weight.grad, hidden.value.sum((0, 1)))


def test_writes(gpt2: LanguageModel) -> None:
    with torch.inference_mode():
        with gpt2.trace(IDS):
            block = gpt2.transformer.h[1]
            before = block.output[0].sum().save()
            block.output[0].view(5, 16)[-1] = 0  # through an alias
            cut = gpt2.lm_head.output.save()
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] + torch.ones(16)
            shifted = gpt2.lm_head.output.save()
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].skip(gpt2.transformer.h[1].input)
            skipped = gpt2.lm_head.output.save()

    def zero(hidden: Tensor) -> None:
        hidden[:, -1] = 0

    assert torch.equal(before.value, hooked_hidden(tiny_gpt2(), "transformer.h.1", IDS).sum())
    assert torch.equal(cut.value, run(zero))
    assert torch.equal(shifted.value, run(lambda hidden: hidden + 1))
    without = tiny_gpt2()
    del without.transformer.h[1]
    with torch.no_grad():
        assert torch.equal(skipped.value, without(IDS).logits)


@pytest.mark.parametrize("given", ["tensor", "list"])
def test_gradients(gpt2: LanguageModel, given: str) -> None:
    with torch.inference_mode():
        weight = torch.linspace(-1, 1, 100)  # both made in the mode
        prompt = IDS + 1
        with gpt2.trace(prompt if given == "tensor" else prompt.tolist()):
            found = gpt2.transformer.h[1].output[0].grad.save()
            (gpt2.lm_head.output * weight).sum().backward()
    expected = gradient(IDS + 1, torch.linspace(-1, 1, 100))
    assert torch.equal(found.value, expected) and ordinary(found.value)
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())


def test_gradients_of_text(eiffel: LanguageModel) -> None:
    with torch.inference_mode(), eiffel.trace("The Eiffel Tower is in") as tracer:
        ids = tracer.ids.tolist()
        found = eiffel.transformer.h[1].output[0].grad.save()
        eiffel.lm_head.output.logsumexp(-1).sum().backward()
    module: Any = eiffel.module
    with torch.no_grad():
        weight = module(torch.tensor(ids)).logits.softmax(-1)  # the slope of logsumexp
    torch.testing.assert_close(found.value, gradient(torch.tensor(ids), weight, module))


def test_a_parameter_of_the_users_is_trained(gpt2: LanguageModel) -> None:
    vector = nn.Parameter(torch.zeros(16))
    with torch.inference_mode(), gpt2.trace(IDS):
        gpt2.transformer.h[1].output[0][:] += vector
        gpt2.lm_head.output.sum().backward()
    expected = gradient(IDS, torch.ones(100)).sum((0, 1))
    torch.testing.assert_close(vector.grad, expected)


def test_functions_in_the_graph(gpt2: LanguageModel) -> None:
    with torch.inference_mode():
        weight = torch.linspace(-1, 1, 100)
        with gpt2.trace(IDS) as tracer:
            found = gpt2.transformer.h[1].output[0].grad.save()
            logits = gpt2.lm_head.output
            either = cond(logits.sum() > 1e9, lambda x: x - weight, lambda x: x * weight, logits)
            fold(lambda sum, row: sum + (row * weight).sum(), torch.zeros(()), logits[0]).save()
            either.sum().backward()
        assert ordinary(tracer.ids)
    assert torch.equal(found.value, gradient(IDS, torch.linspace(-1, 1, 100)))


def test_sessions_and_edits_across_its_border(gpt2: LanguageModel) -> None:
    with gpt2.session():
        with torch.inference_mode(), gpt2.trace(IDS + 1):
            found = gpt2.transformer.h[1].output[0].grad.save()
            (gpt2.lm_head.output * torch.linspace(-1, 1, 100)).sum().backward()
    assert torch.equal(found.value, gradient(IDS + 1, torch.linspace(-1, 1, 100)))
    with torch.inference_mode(), gpt2.edit() as edited:
        edited.lm_head.output = edited.lm_head.output * torch.linspace(-1, 1, 100)
    with edited.trace(IDS):
        found = edited.transformer.h[1].output[0].grad.save()
        edited.lm_head.output.sum().backward()
    torch.testing.assert_close(found.value, gradient(IDS, torch.linspace(-1, 1, 100)))


@pytest.mark.no_wire  # a task of asyncio is no block that can run twice
def test_gradients_of_an_asynchronous_block(gpt2: LanguageModel) -> None:
    async def main() -> Any:
        with torch.inference_mode():
            async with gpt2.trace(IDS.clone()):
                found = gpt2.transformer.h[1].output[0].grad.save()
                (gpt2.lm_head.output * torch.linspace(-1, 1, 100)).sum().backward()
        return found

    found = asyncio.run(main())
    assert torch.equal(found.value, gradient(IDS, torch.linspace(-1, 1, 100)))


def test_generations(gpt2: LanguageModel) -> None:
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "pad_token_id": 0}
    with torch.inference_mode():
        with gpt2.generate(IDS, **options) as generator:
            with generator.every_step():
                last = gpt2.lm_head.output[:, -1].save()
        with gpt2.generate(IDS, **options) as again, again.step(1):
            found = gpt2.transformer.h[1].output[0].grad.save()
            gpt2.lm_head.output.sum().backward()
    module = tiny_gpt2()
    assert torch.equal(generator.output, module.generate(IDS, **options))
    assert ordinary(generator.output)
    for step, logits in enumerate(last.value):
        whole = run(ids=generator.output[:, : 5 + step])
        torch.testing.assert_close(logits, whole[:, -1], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cache = module(IDS, use_cache=True).past_key_values
    kept: list[Tensor] = []
    module.transformer.h[1].register_forward_hook(
        lambda part, args, out: kept.append(out if isinstance(out, Tensor) else out[0])
    )
    logits = module(generator.output[:, 5:6], past_key_values=cache).logits
    expected = torch.autograd.grad(logits.sum(), kept)[0]
    torch.testing.assert_close(found.value, expected, atol=1e-5, rtol=1e-5)


def test_standard_names_and_shapes_without_a_run(gpt2: LanguageModel) -> None:
    gpt2.module.set_attn_implementation("eager")
    with torch.inference_mode():
        with gpt2.trace(IDS):
            pattern = gpt2.blocks[1].attention.pattern.save()
            inside = gpt2.transformer.h[1].attn.ops.softmax[0].output.save()
        with gpt2.scan(IDS):
            shape = gpt2.lm_head.output.save()
    assert shape.value.shape == (1, 5, 100)
    module = tiny_gpt2()
    module.set_attn_implementation("eager")
    with torch.no_grad():
        expected = module(IDS, output_attentions=True).attentions[1]
    torch.testing.assert_close(pattern.value, expected)
    torch.testing.assert_close(inside.value, expected)


def test_weights_that_are_loaded_there_can_be_trained(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    model = LanguageModel(tmp_path)
    with torch.inference_mode(), model.trace([[3, 14, 15]]):
        model.lm_head.output.save()
    assert all(map(ordinary, model.module.state_dict().values()))
    model.module(IDS).logits.sum().backward()
    plain = tiny_gpt2()
    plain(IDS).logits.sum().backward()
    name = "transformer.h.1.mlp.c_fc.weight"
    expected = plain.get_parameter(name).grad
    torch.testing.assert_close(model.module.get_parameter(name).grad, expected)
