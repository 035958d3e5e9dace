"""Caches and TransformerLens's hook names on every architecture that is given text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import nn

from insitu import LanguageModel, PathError
from insitu.models.transformer_lens import OF_BLOCK, OF_MODEL
from tests.fidelity.named import tapped
from tests.fidelity.zoo import ZOO, module_of
from tests.fidelity.zoo.absent import having
from tests.fidelity.zoo.layers import layer

# Its eager attention is another computation than its own, so runs of both cannot be compared.
OTHERWISE = {"falcon-alibi"}
# What makes its queries makes a gate too.
GATED = {("qwen3-next", "q")}
TEXT = [name for name in ZOO if ZOO[name].takes_text and name not in OTHERWISE]


@cache
def kept(name: str) -> LanguageModel:
    return LanguageModel(module_of(name))


@pytest.fixture(autouse=True)
def _eager_is_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attention scores and patterns")
        yield


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    scale = max(float(expected.abs().max()), 1.0)
    assert float((found - expected).abs().max()) <= 2e-5 * scale, what


@pytest.mark.parametrize("name", TEXT)
def test_caches_hold_what_there_is(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    found = model.run_with_cache(inputs["input_ids"], **others)
    with torch.no_grad():
        plain = model.module(**inputs)
    close(found.logits, plain.logits, name)
    for number, block in enumerate(model.blocks):
        there = set(block.role)
        for key in ("residual_in", "residual_mid", "residual_out", "attention_out", "mlp_out"):
            assert ((key, number) in found) is (key in there), (name, key)
        others = there & {"cross_attention_out", "mixer_out"}
        if {"residual_in", "attention_out", "mlp_out"} <= there and not others:
            added = found["attention_out", number] + found["mlp_out", number]
            total = found["residual_in", number] + added
            close(found["residual_out", number], total, f"{name} {number}")


def required(name: str, block: nn.Module) -> set[str]:
    """Hooks of a block that have to be there, by the layers that it has."""
    found: set[str] = set()
    if name in having("residual"):
        found |= {"hook_resid_pre", "hook_resid_post", "ln1.hook_normalized"}
    if layer(block, "attention.out"):
        attention = ("q", "v", "z", "attn_scores", "pattern", "result")
        found |= {f"attn.hook_{part}" for part in attention}
    if layer(block, "mlp.into"):
        found |= {"mlp.hook_pre", "mlp.hook_post"}
    return found


@pytest.mark.parametrize("name", TEXT)
def test_hooks_hang_together(name: str) -> None:
    kinds = {tuple(block.role): number for number, block in enumerate(kept(name).blocks)}
    for number in kinds.values():  # the last of each kind
        hooks_hang_together(name, number)


def hooks_hang_together(name: str, number: int) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    block, around = model.blocks[number], f"blocks.{number}"
    hooks = {}
    for key in (*OF_MODEL, *(f"{around}.{key}" for key in OF_BLOCK)):
        try:
            hooks[key] = model.hook(key)
        except PathError as error:
            assert "this model" in str(error) or "The model has no" in str(error)
    assert {f"{around}.{key}" for key in required(name, block.module)} <= hooks.keys()
    layers = {letter: layer(block.module, f"attention.{letter}") for letter in "qkv"}
    with tapped(layers) as seen, torch.no_grad():
        model.module(**inputs)
    with model.trace(inputs["input_ids"], **others):
        saved = {key: hook.output.save() for key, hook in hooks.items()}
    values = {key: one.value for key, one in saved.items()}
    for norm in (f"{around}.ln1", f"{around}.ln2", "ln_final"):
        if f"{norm}.hook_normalized" not in values:
            continue
        normalised, scale = values[f"{norm}.hook_normalized"], values[f"{norm}.hook_scale"]
        given = values[f"{norm}.hook_in"].float()
        if bool((normalised.float().mean(-1).abs() < 1e-4).all()):
            given = given - given.mean(-1, keepdim=True)
        close(normalised.float() * scale.float(), given, f"{name} {norm}")
        with model.trace(inputs["input_ids"], **others):
            hook = model.hook(f"{norm}.hook_normalized")
            hook.output = hook.output.clone()
            again = model.hook(f"{norm}.hook_out").output.save()
        close(again.value, values[f"{norm}.hook_out"], f"{name} {norm}")
    attention = f"{around}.attn"
    if f"{attention}.hook_z" in values:
        z, result = values[f"{attention}.hook_z"], values[f"{attention}.hook_result"]
        close(result, torch.einsum("bthd,hdm->bthm", z, block.role["attention"].W_O), name)
        assert z.shape[:2] == values[f"{attention}.hook_q"].shape[:2] and z.ndim == 4
    for letter, projection in layers.items():
        if projection is None or (name, letter) in GATED:
            continue
        (made,) = seen[letter, "output"]
        close(values[f"{attention}.hook_{letter}"].flatten(2), made, f"{name} {letter}")
