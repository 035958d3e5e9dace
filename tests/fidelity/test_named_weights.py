"""Weights by name on every architecture: what layers are given and these make what has a name.

Hooks on the layers, which are written down in `zoo/layers.py`, say what they are given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from insitu import PathError
from tests.fidelity.named import (
    attention_roles,
    close,
    eager_is_expected,  # noqa: F401
    kept,
    last_blocks,
    missing,
    named_stacks,
    opened,
    tapped,
)
from tests.fidelity.zoo import ZOO
from tests.fidelity.zoo.absent import having, lacking
from tests.fidelity.zoo.layers import layer

pytestmark = pytest.mark.no_wire  # what is sent does not depend on the architecture

ROWS = 24  # more than `d_model`, so that nothing in a matrix can hide
# Queries are scaled before they are multiplied with keys; or both, with their rotation.
SCALED = {"opt": ("q",), "whisper": ("q",), "gpt-oss": ("q", "k")}
ACTIVATIONS: dict[str, Any] = {
    "modernbert": F.gelu,
    **dict.fromkeys(("gemma", "gemma2", "gemma3"), lambda x: F.gelu(x, approximate="tanh")),
}


@pytest.mark.parametrize("name", having("W_Q"))
def test_queries_keys_and_values_are_made_with_their_weights(name: str) -> None:
    made = [
        made_with_weights(name, block, role)
        for block in last_blocks(name, kept(name))
        for role in attention_roles(block)
    ]
    assert made


@pytest.mark.parametrize("name", lacking("W_Q"))
def test_where_no_matrix_makes_queries_keys_and_values_this_is_said(name: str) -> None:
    for stack in named_stacks(name, kept(name)):
        for block in stack:
            if not attention_roles(block):
                missing(block, "attention", match="there is no attention in this block")
                continue
            for key in ("W_Q", "W_K", "W_V"):
                with pytest.raises(PathError, match="by no single matrix"):
                    getattr(block.role["attention"], key)


def made_with_weights(name: str, block: Any, role: str) -> None:
    attention, module = block.role[role], block.module
    one = layer(module, f"{role}.qkv") if role == "attention" else None
    layers = {letter: one or layer(module, f"{role}.{letter}") for letter in ("q", "k", "v")}
    with tapped(layers) as seen, opened(kept(name), name, ZOO[name].inputs(ROWS, 7)):
        saved = {letter: getattr(attention, letter).save() for letter in layers}
    for letter, weights in (("q", attention.W_Q), ("k", attention.W_K), ("v", attention.W_V)):
        value = saved[letter].value
        assert weights.shape == (value.shape[1], 16, value.shape[-1])
        # Rotation leaves the first position alone, and all that is left then is a bias.
        (given,) = seen[letter, "input"]
        made = torch.einsum("rd,hde->rhe", given[:, 0], weights)
        norm = layer(module, f"attention.{letter}_norm") if letter != "v" else None
        found = value[:, :, 0]
        if norm is None:
            made, found = made - made[:1], found - found[:1]
        else:
            made = normalised(norm, made)
        scale = float((made * found).sum() / (made * made).sum())
        if letter in SCALED.get(name, ()):
            assert 0 < scale != 1
            made = made * scale
        close(found, made, f"{block.path} {role} {letter} {scale}", 1e-4, 1e-2)


def normalised(norm: nn.Module, heads: torch.Tensor) -> torch.Tensor:
    """Heads `(row, head, size)` after a norm, of each of them or of all together."""
    weight = getattr(norm, "weight", None)
    with torch.no_grad():
        if weight is not None and weight.shape[-1] != heads.shape[-1]:
            return norm(heads.flatten(1)).view_as(heads)
        return norm(heads)


@pytest.mark.parametrize("name", having("heads"))
def test_output_projections_make_with_their_weights_what_they_return(name: str) -> None:
    model = kept(name)
    for block in last_blocks(name, model):
        for role in attention_roles(block):
            attention, out = block.role[role], layer(block.module, f"{role}.out")
            assert out is not None
            with tapped({"out": out}) as seen, opened(model, name, ZOO[name].inputs(ROWS, 7)):
                z = attention.z.save()
                block.output[0].save()  # so that it runs to its end
            (given,), (made,) = seen["out", "input"], seen["out", "output"]
            assert torch.equal(z.value.transpose(1, 2).flatten(2), given.view(*made.shape[:2], -1))
            heads = torch.einsum("bhtd,hdm->bhtm", z.value, attention.W_O)
            close(heads.sum(1) + bias_of(out), made, block.path)


@pytest.mark.parametrize("name", having("MLP"))
def test_mlps_make_with_their_weights_what_has_a_name_in_them(name: str) -> None:
    model, inputs = kept(name), ZOO[name].inputs(ROWS, 7)
    found = 0
    for block in last_blocks(name, model):
        layers = {key: layer(block.module, f"mlp.{key}") for key in ("into", "up", "out")}
        if "mlp" not in list(block.role):
            assert not any(layers.values()), block.path
            continue
        mlp = block.role["mlp"]
        if layers["into"] is None:
            assert "experts" in list(block.role)
            for key in ("W_in", "W_gate", "W_out"):
                with pytest.raises(PathError, match="each with its own"):
                    getattr(mlp, key)
            continue
        found += 1
        with tapped(layers) as seen, opened(model, name, inputs):
            pre, post = mlp.pre.save(), mlp.post.save()
            block.output[0].save()  # so that it runs to its end
        (given,), (last,), (made,) = (
            seen[key] for key in (("into", "input"), ("out", "input"), ("out", "output"))
        )
        given, pre, post, last, made = (
            value.flatten(0, -2) for value in (given, pre.value, post.value, last, made)
        )
        assert torch.equal(post, last)
        close(post @ mlp.W_out, made - bias_of(layers["out"]), block.path, 1e-4)
        (into,) = seen["into", "output"]
        gated = layers["up"] is not None or into.shape[-1] == 2 * pre.shape[-1]
        first = mlp.W_gate if gated else mlp.W_in
        if not gated:
            close(given @ first, pre - bias_of(layers["into"]), block.path, 1e-4)
            with pytest.raises(PathError, match="has no gate"):
                mlp.W_gate  # noqa: B018
            continue
        close(given @ first, pre, block.path, 1e-4)
        activation = ACTIVATIONS.get(name, F.silu)
        close(post, activation(pre) * (given @ mlp.W_in), block.path, 1e-4)
    assert found


def bias_of(part: nn.Module | None) -> Any:
    bias = getattr(part, "bias", None)
    return 0 if bias is None else bias.detach()
