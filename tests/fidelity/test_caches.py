"""Caches and TransformerLens's hook names on every architecture that is given text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from insitu import LanguageModel, PathError
from insitu.models.transformer_lens import OF_BLOCK, OF_MODEL
from tests.fidelity.zoo import ZOO, module_of

# Its eager attention is another computation than its own, so runs of both cannot be compared.
OTHERWISE = {"falcon-alibi"}
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
    for layer, block in enumerate(model.blocks):
        there = set(block.role)
        for key in ("residual_in", "residual_mid", "residual_out", "attention_out", "mlp_out"):
            assert ((key, layer) in found) is (key in there), (name, key)
        others = there & {"cross_attention_out", "mixer_out"}
        if {"residual_in", "attention_out", "mlp_out"} <= there and not others:
            added = found["attention_out", layer] + found["mlp_out", layer]
            total = found["residual_in", layer] + added
            close(found["residual_out", layer], total, f"{name} {layer}")


@pytest.mark.parametrize("name", TEXT)
def test_hooks_hang_together(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(2, 7)
    others = {key: value for key, value in inputs.items() if key != "input_ids"}
    last = len(model.blocks) - 1
    hooks = {}
    for key in (*OF_MODEL, *(f"blocks.{last}.{key}" for key in OF_BLOCK)):
        try:
            hooks[key] = model.hook(key)
        except PathError as error:
            assert "this model" in str(error) or "The model has no" in str(error)
    with model.trace(inputs["input_ids"], **others):
        saved = {key: hook.output.save() for key, hook in hooks.items()}
    values = {key: one.value for key, one in saved.items()}
    for norm in (f"blocks.{last}.ln1", f"blocks.{last}.ln2", "ln_final"):
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
    attention = f"blocks.{last}.attn"
    if f"{attention}.hook_z" in values:
        z, result = values[f"{attention}.hook_z"], values[f"{attention}.hook_result"]
        w_o = model.blocks[last].role["attention"].W_O
        close(result, torch.einsum("bthd,hdm->bthm", z, w_o), name)
    for letter in "qkv":
        if f"{attention}.hook_{letter}" in values:
            heads = values[f"{attention}.hook_{letter}"]
            given = values.get(f"{attention}.{letter}.hook_in")
            assert heads.ndim == 4 and heads.shape[:2] == (
                2,
                values[f"{attention}.hook_z"].shape[1],
            )
            layer = model.vocabulary._body.blocks()[model.blocks[last].path].attention
            path = layer.projections[letter]
            if given is not None:
                made = model.modules[path](given)
                if made.shape[-1] == heads.shape[2] * heads.shape[3]:
                    close(heads.flatten(2), made.detach(), f"{name} {letter}")
