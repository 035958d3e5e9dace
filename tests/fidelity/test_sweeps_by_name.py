"""Sweeps over what stands between modules, and over what blocks are given: shared, and right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from tests.fidelity.architectures import spread_out
from tests.thinning import sampled, thinned

pytestmark = pytest.mark.no_wire  # it looks at plans

IDS = torch.tensor([[5, 17, 3, 88, 41, 2, 60]])
WIDTH = 4  # of a head
VECTOR = torch.linspace(-1, 1, 16)


@pytest.fixture(params=["gpt2", "llama"])
def language_model(request: pytest.FixtureRequest) -> LanguageModel:
    """Models in which each part matters, as it does not at random initialisations."""
    model = request.getfixturevalue(request.param)
    spread_out(model.module)
    return model


def parts(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """The blocks, their attention, and what their heads' values are projected with."""
    if module.config.model_type == "gpt2":
        blocks = list(module.transformer.h)
        return blocks, [b.attn for b in blocks], [b.attn.c_proj for b in blocks]
    blocks = list(module.model.layers)
    return blocks, [b.self_attn for b in blocks], [b.self_attn.o_proj for b in blocks]


def without_projected(module: nn.Module, name: str, layer: int, head: int) -> object:
    """Hangs a hook on the model that makes a head of the queries, keys or values zero."""
    attention = parts(module)[1][layer]
    owner, begin = attention, head * WIDTH
    if module.config.model_type == "gpt2":
        owner, begin = attention.c_attn, 16 * "qkv".index(name) + begin
    else:
        owner = getattr(attention, f"{name}_proj")

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output[..., begin : begin + WIDTH] = 0

    return owner.register_forward_hook(hook)


def without_pattern(module: nn.Module, name: str, layer: int, head: int) -> object:
    """The same for what a head gives, which it does if it looks nowhere."""

    def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        args[0][..., head * WIDTH : (head + 1) * WIDTH] = 0

    return parts(module)[2][layer].register_forward_pre_hook(hook)


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits[0, -1]


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("share", sampled([True, False], [False]))
@pytest.mark.parametrize("name", thinned(["q", "k", "v", "pattern"], ["k", "pattern"]))
@pytest.mark.filterwarnings("ignore:.*eager:UserWarning")
def test_heads_between_modules(language_model: LanguageModel, name: str, share: bool) -> None:
    model, module = language_model, language_model.module
    expected, saved = [], []
    without = without_pattern if name == "pattern" else without_projected
    with model.trace(share_prefixes=share) as tracer:
        for layer in range(model.n_layers):
            for head in range(2):
                with tracer.invoke(IDS):
                    getattr(model.blocks[layer].attention, name)[:, head] = 0
                    saved.append(model.logits[0, -1].save())
    for layer in range(model.n_layers):
        for head in range(2):
            with without(module, name, layer, head):
                expected.append(logits(module))
    found = torch.stack([each.value for each in saved])
    assert (found - logits(module)).abs().amax(-1).min() > 1e-3
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    if share:
        last = tracer.plan.passes[-1]
        assert (last.skipped, last.rows) == (1, 2 * (model.n_layers - 1)), tracer.plan.explain()


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["gpt2"]), indirect=True)
@pytest.mark.parametrize("share", [True, False])
def test_the_stream_between_attention_and_mlp(language_model: LanguageModel, share: bool) -> None:
    model, module = language_model, language_model.module
    saved = []
    with model.trace(share_prefixes=share) as tracer:
        with tracer.invoke(IDS):
            before = [block.residual_mid[0].norm().save() for block in model.blocks]
        for block in model.blocks:
            with tracer.invoke(IDS):
                block.residual_mid += VECTOR
                saved.append((block.residual_mid[0].save(), model.logits[0, -1].save()))

    def add(module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> object:
        return (output[0] + VECTOR, *output[1:])

    for layer, (own, found) in enumerate(saved):
        with parts(module)[1][layer].register_forward_hook(add):
            torch.testing.assert_close(found.value, logits(module), rtol=1e-5, atol=1e-6)
        assert (own.value - VECTOR).norm().item() == pytest.approx(before[layer].item(), rel=1e-5)
    if share:
        assert tracer.plan.passes[-1].skipped == 1, tracer.plan.explain()


def moved(position: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0][:, position] += VECTOR

    return hook


@pytest.mark.parametrize("language_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
@pytest.mark.parametrize("share", [True, False])
def test_what_blocks_are_given_at_late_positions(
    language_model: LanguageModel, share: bool
) -> None:
    model, module = language_model, language_model.module
    saved = []
    with model.trace(share_prefixes=share) as tracer:
        for block in model.blocks[1:]:
            for position in (4, 6):
                with tracer.invoke(IDS):
                    before = block.residual_in[0, position].clone()
                    block.residual_in[:, position] += VECTOR
                    given = block.residual_in.save()  # all of it is known
                    added = (block.residual_in[0, position] - before).save()
                    saved.append((given, added, model.logits[0, -1].save()))
    states: list[torch.Tensor] = []
    for block in parts(module)[0][1:]:
        for position in (4, 6):
            keep = lambda module, args: states.append(args[0].clone())  # noqa: E731
            with (
                block.register_forward_pre_hook(moved(position)),
                block.register_forward_pre_hook(keep),
            ):
                expected = logits(module)
            given, added, found = saved.pop(0)
            torch.testing.assert_close(found.value, expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(given.value, states[-1], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(added.value, VECTOR, rtol=1e-4, atol=1e-5)
    if share:
        assert tracer.plan.passes[-1].positions == 3, tracer.plan.explain()
