"""Attribution patching is a difference of two runs times a gradient, all taken by plain hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from insitu import LanguageModel
from insitu.graph.errors import OptionError, PromptError
from insitu.methods import (
    activation_patching,
    attribution_patching,
    kl_divergence,
    logit_difference,
)
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import module_of
from tests.methods.edges_by_hand import CLEAN, CORRUPTED, linear_gpt2
from tests.thinning import sampled

MODELS: dict[str, Callable[[], nn.Module]] = {"gpt2": tiny_gpt2, "llama": tiny_llama}
METRIC = logit_difference(3, 50)


def difference(logits: Tensor) -> Tensor:
    return logits[-1, 3] - logits[-1, 50]


def blocks_of(module: Any) -> Any:
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def parts_of(module: nn.Module, site: str) -> list[nn.Module]:
    """The modules whose first argument is the site, layer by layer."""
    blocks = blocks_of(module)
    if site == "residual_in":
        return list(blocks)
    return [b.attn.c_proj if hasattr(b, "attn") else b.self_attn.o_proj for b in blocks]


def run(module: nn.Module, site: str, ids: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What stands at a site in all layers, its gradient, and the metric."""
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        found.append(args[0] + torch.zeros_like(args[0]).requires_grad_())
        return (found[-1], *args[1:])

    handles = [part.register_forward_pre_hook(hook) for part in parts_of(module, site)]
    measured = difference(module(ids[None]).logits[0])
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(measured, found)
    return [value.detach()[0] for value in found], [g[0] for g in gradients], measured.detach()


def by_hand(module: nn.Module, site: str, direction: str) -> tuple[Tensor, Tensor]:
    """The estimates of each number of the site, and the difference of the metric of both runs."""
    clean, slope_clean, of_clean = run(module, site, CLEAN)
    corrupted, slope_corrupted, of_corrupted = run(module, site, CORRUPTED)
    if direction == "denoising":
        change = [(a - b) * g for a, b, g in zip(clean, corrupted, slope_corrupted, strict=True)]
        return torch.stack(change), of_clean - of_corrupted
    change = [(b - a) * g for a, b, g in zip(clean, corrupted, slope_clean, strict=True)]
    return torch.stack(change), of_corrupted - of_clean


@pytest.mark.parametrize("direction", sampled(["denoising", "noising"], ["denoising"]))
@pytest.mark.parametrize("name", MODELS)
def test_estimates_are_those_of_plain_hooks(name: str, direction: Any) -> None:
    module = MODELS[name]()
    model = LanguageModel(module)
    change, way = by_hand(module, "residual_in", direction)
    assert change.abs().max() > 1e-4
    run_of = (model, CLEAN, CORRUPTED, METRIC)
    found = attribution_patching(*run_of, sites="residual_in", direction=direction)
    torch.testing.assert_close(found.values, change.sum(-1) / way, rtol=1e-4, atol=1e-5)
    assert [axis.name for axis in found.axes] == ["layer", "position"]
    found = attribution_patching(
        *run_of,
        sites="residual_in",
        by="layer",
        direction=direction,
        normalised=False,
        positions=[-1, 1],
    )
    torch.testing.assert_close(found.values, change[:, [-1, 1]].sum((-1, -2)), atol=1e-6, rtol=1e-4)

    heads, _ = by_hand(module, "z", direction)
    heads = heads.unflatten(-1, (4, -1)).sum(-1)  # (layer, position, head)
    found = attribution_patching(
        *run_of,
        sites=["z"],
        by=("head", "position", "layer"),
        heads=[3, 0],
        positions=[2, -1],
        layers=[1, -1],
        direction=direction,
        normalised=False,
    )
    expected = heads[[1, -1]][:, [2, 4]][:, :, [3, 0]].permute(2, 1, 0)
    torch.testing.assert_close(found.values[0], expected, rtol=1e-4, atol=1e-6)
    assert found.sizes == {"site": 1, "head": 2, "position": 2, "layer": 2}
    assert found.axis("head").labels == ("3", "0")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_what_is_chosen_twice_counts_once_in_a_sum(direction: Any) -> None:
    module = tiny_gpt2()
    change, _ = by_hand(module, "z", direction)
    heads = change.unflatten(-1, (4, -1))  # (layer, position, head, d_head)
    found = attribution_patching(
        LanguageModel(module),
        CLEAN,
        CORRUPTED,
        METRIC,
        sites="z",
        by="layer",
        positions=[4, 1, -1],
        heads=[3, 0, -1],
        direction=direction,
        normalised=False,
    )
    expected = heads[:, [1, 4]][:, :, [0, 3]].sum((1, 2, 3))
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)


def test_positions_that_coincide_in_one_prompt_of_a_pair() -> None:
    """Of two values that are put in one place, the last is there."""
    module = tiny_gpt2()
    short = CLEAN[:3]
    clean, _, _ = run(module, "residual_in", short)
    corrupted, slope, _ = run(module, "residual_in", CORRUPTED)
    asked = (LanguageModel(module), short, CORRUPTED, METRIC)
    options: Any = {"sites": "residual_in", "by": "layer", "normalised": False}
    found = attribution_patching(*asked, positions=[2, -1], **options)
    pairs = zip(clean, corrupted, slope, strict=True)
    expected = [((a[[2, 2]] - b[[2, 4]]) * g[[2, 4]]).sum() for a, b, g in pairs]
    torch.testing.assert_close(found.values, torch.stack(expected), rtol=1e-4, atol=1e-6)

    clean, slope, _ = run(module, "residual_in", short)
    found = attribution_patching(*asked, positions=[2, -1], direction="noising", **options)
    pairs = zip(clean, corrupted, slope, strict=True)
    expected = [((b[4] - a[2]) * g[2]).sum() for a, b, g in pairs]
    torch.testing.assert_close(found.values, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_behind_what_a_metric_measures_nothing_changes_it() -> None:
    module = tiny_gpt2()
    found: list[list[Tensor]] = []
    for ids in (CLEAN, CORRUPTED):
        seen: list[Tensor] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kept: list[Tensor] = seen) -> Any:
            kept.append(args[0].detach().requires_grad_())
            return (kept[-1], *args[1:])

        handle = module.transformer.h[0].attn.c_proj.register_forward_pre_hook(hook)
        states = module(ids[None], output_hidden_states=True).hidden_states[1]
        handle.remove()
        found.append([seen[0], *torch.autograd.grad(states[0, -1, 0], seen)])
    (clean, _), (corrupted, slope) = found
    expected = torch.zeros(4, 4)
    expected[0] = ((clean - corrupted) * slope)[0].unflatten(-1, (4, -1)).sum((0, 2)).detach()
    values = attribution_patching(
        LanguageModel(module),
        CLEAN,
        CORRUPTED,
        lambda run: run.blocks[0].block_out[0, -1, 0],
        sites="z",
        by=("layer", "head"),
        normalised=False,
    ).values
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(values, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.thorough
def test_patterns_have_gradients_too() -> None:
    module = tiny_gpt2()
    module.set_attn_implementation("eager")
    runs = []
    for ids in (CLEAN, CORRUPTED):
        made = module(ids[None], output_attentions=True)
        gradients = torch.autograd.grad(difference(made.logits[0]), made.attentions)
        runs.append((torch.stack(made.attentions)[:, 0].detach(), torch.stack(gradients)[:, 0]))
    (clean, _), (corrupted, slope) = runs
    found = attribution_patching(
        LanguageModel(module),
        CLEAN,
        CORRUPTED,
        METRIC,
        sites="pattern",
        by=("layer", "head", "query", "key"),
        normalised=False,
    )
    torch.testing.assert_close(found.values, (clean - corrupted) * slope, rtol=1e-4, atol=1e-6)


def test_in_a_linear_model_an_estimate_is_the_effect_of_the_patch() -> None:
    module = linear_gpt2()
    clean, _, _ = run(module, "residual_in", CLEAN)
    _, _, start = run(module, "residual_in", CORRUPTED)
    effects = torch.zeros(2, len(CLEAN))
    for layer, part in enumerate(parts_of(module, "residual_in")):
        for position in range(len(CLEAN)):

            def hook(_: nn.Module, args: Any, at: int = position, n: int = layer) -> Any:
                patched = args[0].clone()
                patched[0, at] = clean[n][at]
                return (patched, *args[1:])

            handle = part.register_forward_pre_hook(hook)
            with torch.no_grad():
                effects[layer, position] = difference(module(CORRUPTED[None]).logits[0]) - start
            handle.remove()
    model = LanguageModel(module)
    found = attribution_patching(
        model, CLEAN, CORRUPTED, METRIC, sites="residual_in", normalised=False
    )
    assert effects.abs().max() > 0.05
    torch.testing.assert_close(found.values, effects, rtol=1e-4, atol=1e-5)


def test_prompts_of_different_length_are_apart() -> None:
    module = tiny_llama()
    model = LanguageModel(module)
    clean, corrupted = [CLEAN.tolist(), [4, 8]], [CORRUPTED.tolist(), [4, 9]]
    found = attribution_patching(
        model, clean, corrupted, METRIC, sites="residual_in", normalised=False
    )
    change, _ = by_hand(module, "residual_in", "denoising")
    torch.testing.assert_close(found.values[0], change.sum(-1), rtol=1e-4, atol=1e-6)
    assert found.values[1, :, 2:].isnan().all()
    assert not found.values[1, :, :2].isnan().any()
    assert found.select(prompt=1).sizes == {"layer": 3, "position": 2}
    # Positions may mean the same in prompts of different length.
    last = attribution_patching(
        model, CLEAN, CORRUPTED[:4], METRIC, sites="residual_in", positions=-1, normalised=False
    )
    values, _, _ = run(module, "residual_in", CLEAN)
    others, slopes, _ = run(module, "residual_in", CORRUPTED[:4])
    expected = [
        ((a[-1] - b[-1]) * g[-1]).sum() for a, b, g in zip(values, others, slopes, strict=True)
    ]
    torch.testing.assert_close(last.values[:, 0], torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_a_divergence_is_estimated_from_the_corrupted_run() -> None:
    module = tiny_gpt2()
    with torch.no_grad():
        log_p = module(CLEAN[None]).logits[0, -1].log_softmax(-1)
    leaves: list[Tensor] = []

    def hook(_: nn.Module, args: Any) -> Any:
        leaves.append(args[0] + torch.zeros_like(args[0]).requires_grad_())
        return (leaves[-1], *args[1:])

    handle = blocks_of(module)[1].register_forward_pre_hook(hook)
    log_q = module(CORRUPTED[None]).logits[0, -1].log_softmax(-1)
    (slope,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), leaves)
    module(CLEAN[None])
    handle.remove()
    expected = ((leaves[1] - leaves[0]).detach() * slope).sum((0, 1, 2))
    found = attribution_patching(
        LanguageModel(module),
        CLEAN,
        CORRUPTED,
        kl_divergence(),
        sites="residual_in",
        by="layer",
        layers=1,
        normalised=False,
    )
    torch.testing.assert_close(found.values[0], expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_estimated_says_why() -> None:
    model = LanguageModel(tiny_gpt2())
    run_of = (model, CLEAN, CORRUPTED, METRIC)
    with pytest.raises(OptionError, match="no 'layer'"):
        attribution_patching(*run_of, by="position")
    with pytest.raises(OptionError, match="no axis.* of 'residual_out'"):
        attribution_patching(*run_of, by=("layer", "head"))
    with pytest.raises(OptionError, match="nearest: 'denoising'"):
        attribution_patching(*run_of, direction="denoise")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="`heads` are chosen"):
        attribution_patching(*run_of, heads=2)
    with pytest.raises(OptionError, match="nothing to take shares of"):
        attribution_patching(model, CLEAN, CLEAN, METRIC)
    with pytest.raises(PromptError, match="equally long"):
        attribution_patching(model, CLEAN, CORRUPTED[:3], METRIC)
    attribution_patching(*run_of)


def test_of_a_model_in_half_precision_small_products_are_not_lost() -> None:
    """Changes of about 1e-3 times slopes of about 1e-5 are nothing in float16."""
    module = tiny_gpt2().half()
    clean, _, _ = run(module, "z", CLEAN)
    corrupted, slopes, _ = run(module, "z", CORRUPTED)
    expected = [
        ((one.float() - other.float()) * slope.float()).sum() / 64
        for one, other, slope in zip(clean, corrupted, slopes, strict=True)
    ]
    found = attribution_patching(
        LanguageModel(module), CLEAN, CORRUPTED, lambda logits: difference(logits).float() / 64,
        sites="z", by="layer", normalised=False,
    )  # fmt: skip
    torch.testing.assert_close(found.values, torch.stack(expected), rtol=5e-3, atol=0)


@pytest.mark.thorough
def test_layers_without_what_is_patched_are_left_out() -> None:
    """Of the three blocks of this model, the second has attention."""
    model = LanguageModel(module_of("jamba"))
    run_of: Any = (model, [5, 17, 3], [5, 18, 3], METRIC)
    for method in (attribution_patching, activation_patching):
        found = method(*run_of, sites=["z", "attention_out"], by="layer", normalised=False)
        assert found.axis("layer").labels == ("1",)
        with pytest.raises(OptionError, match=r"Layer 0 has no `attention.z`: there is no"):
            method(*run_of, sites="z", by="layer", layers=[0, 1])
