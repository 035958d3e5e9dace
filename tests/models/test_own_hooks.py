"""Hooks of the user's own on a wrapped model see each prompt alone, as plain PyTorch shows it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from tests.conftest import hooked, tiny_gpt2
from tests.fidelity.architectures import tiny_llama
from tests.thinning import sampled

PROMPTS = [torch.tensor([[3, 14, 15, 92, 65]]), torch.tensor([[7, 8]]), torch.tensor([[9, 1, 4]])]
Change = Callable[[torch.Tensor], torch.Tensor]


def last_position(hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden[:, :-1], hidden[:, -1:] * 3], 1)


def first_position(hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([hidden[:, :1] * 3, hidden[:, 1:]], 1)


def centred(hidden: torch.Tensor) -> torch.Tensor:
    return hidden - hidden.mean()


def longest(hidden: torch.Tensor) -> torch.Tensor:
    return hidden * hidden.shape[1]


def in_place(hidden: torch.Tensor) -> torch.Tensor:
    hidden[:, -1] = 1
    return hidden


def after(module: nn.Module, change: Change) -> Any:
    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(hook)


def before(module: nn.Module, change: Change) -> Any:
    return module.register_forward_pre_hook(lambda part, args: (change(args[0]), *args[1:]))


def everywhere(module: nn.Module, change: Change) -> Any:
    def hook(part: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:]) if part is module else None

    return nn.modules.module.register_module_forward_pre_hook(hook)


@pytest.mark.parametrize("change", [last_position, first_position, centred, longest, in_place])
@pytest.mark.parametrize("way", [after, before, everywhere])
@pytest.mark.parametrize("used", sampled([False, True], [False]))
def test_a_hook_that_changes_a_value_sees_one_prompt(
    change: Change, way: Callable[[nn.Module, Change], Any], used: bool
) -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)

    def read() -> list[torch.Tensor]:
        with model.trace() as tracer:
            found: list[Any] = []
            for prompt in [*PROMPTS, PROMPTS[0]]:
                with tracer.invoke(prompt):
                    found.append(model.transformer.h[2].output[0].save())
        return [one.value for one in found]

    if used:  # the run of this block is planned before there is a hook
        read()
    handle = way(module.transformer.h[1], change)
    try:
        found = read()
        alone = [hooked(module, "transformer.h.2", prompt) for prompt in PROMPTS]
    finally:
        handle.remove()
    for one, expected in zip(found, [*alone, alone[0]], strict=True):
        expected = expected[0] if isinstance(expected, tuple) else expected
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_a_hook_sees_one_prompt_of_a_generation(make: Callable[[], Any]) -> None:
    module = make()
    model = LanguageModel(module)
    embedding = module.get_input_embeddings()
    handle = after(embedding, centred)
    try:
        with model.generate(max_new_tokens=3, eos_token_id=None) as generator:
            invokers = []
            for prompt in PROMPTS:
                with generator.invoke(prompt) as invoker:
                    invokers.append(invoker)
        for prompt, invoker in zip(PROMPTS, invokers, strict=True):
            mask = torch.ones_like(prompt)
            expected = module.generate(
                prompt, attention_mask=mask, max_new_tokens=3, eos_token_id=None, pad_token_id=0
            )
            assert torch.equal(invoker.output, expected)
    finally:
        handle.remove()
    assert "hooks" in generator.plan.explain()


def test_prompts_share_a_pass_again_without_the_hook() -> None:
    module = tiny_gpt2()
    model = LanguageModel(module)
    shapes: set[torch.Size] = set()

    def look(part: nn.Module, args: Any, output: torch.Tensor) -> None:
        shapes.add(output.shape)

    def passes() -> int:
        with model.trace() as tracer:
            for prompt in PROMPTS:
                with tracer.invoke(prompt):
                    model.transformer.h[1].output[0].save()
        return len(tracer.plan.passes)

    assert passes() == 1
    handle = module.transformer.wte.register_forward_hook(look)
    assert passes() == 3
    handle.remove()
    assert shapes == {(*prompt.shape, 16) for prompt in PROMPTS}
    assert passes() == 1
