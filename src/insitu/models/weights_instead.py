"""The lines that read weights which have no standard name: biases, W_pos, QK and OV.

TransformerLens has names for them. An error for one of these names says the line to write on this
model, with the paths of its own modules. Weights with a standard name are in `weights.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from insitu.models.body import Body
from insitu.models.head_projections import head_projection
from insitu.models.parts import Block, Heads
from insitu.models.weights import Weights

_LETTERS: Mapping[str, str] = {"b_Q": "q", "b_K": "k", "b_V": "v"}
_OF_MLP = ("b_in", "b_gate", "b_out")
_PRODUCTS: Mapping[str, tuple[str, str]] = {"QK": ("W_Q", "W_K"), "OV": ("W_V", "W_O")}
_OF_BLOCK = frozenset([*_LETTERS, "b_O", *_OF_MLP, *_PRODUCTS])


def weight_instead(body: Body, weights: Weights, path: str, name: str) -> str:
    """Returns the line that reads such a weight, as the end of a message.

    Args:
        body: the facts of the model's parts.
        weights: the weights of its parts.
        path: the module that was asked for it.
        name: the name, such as "b_Q".

    Returns:
        The line, or why the model has no such weight; "" for any other name.
    """
    if name == "W_pos":
        return _positions(body)
    if name == "b_U":
        return _whole_bias(body, body.unembedding, "unembedding", "model.load()", "")
    if name not in _OF_BLOCK or not body.stacks or not body.stacks[-1]:
        return ""
    stack = body.stacks[-1]
    own = next((one for one in stack if f"{path}.".startswith(f"{one}.")), None)
    block = body.blocks().get(own or stack[0])
    if block is None:
        return ""
    if name in _PRODUCTS:
        number = stack.index(block.path)
        return _spread(_product(weights, block, name), own, "model.blocks", number)
    listed, _, number = block.path.rpartition(".")
    line = _of_block(body, weights, block, name)
    return _spread(line, own, _written("model.load()", listed), int(number))


def _spread(line: str, own: str | None, stack: str, number: int) -> str:
    """A line about `block`, for the block that was asked, or for all where the model was."""
    if not line.startswith("block."):
        return line
    if own is not None:
        return f": write `{line.replace('block.', f'{stack}[{number}].')}`"
    return f": write `torch.stack([{line} for block in {stack}])`"


def _product(weights: Weights, block: Block, name: str) -> str:
    heads = block.attention
    if heads is None:
        return ": there is no attention in this block"
    first, second = (f"block.attention.{one}" for one in _PRODUCTS[name])
    count = heads.count // (weights._count(heads, "k")[0] or heads.count)
    shared = f".repeat_interleave({count}, 0)" if count > 1 else ""  # by several query heads
    if name == "OV":
        return f"{first}{shared} @ {second}"
    return f"{first} @ {second}{shared}.mT"


def _of_block(body: Body, weights: Weights, block: Block, name: str) -> str:
    """The line that reads a bias of a block, written of `block`; or why there is none."""
    heads, mlp = block.attention, block.mlp
    if name in _OF_MLP:
        if mlp is None or mlp.router is not None:
            none = "there is no MLP in this block" if mlp is None else "its MLP consists of experts"
            return f": {none}"
        gated = mlp.gate is not None
        layers = {"b_in": mlp.gate or mlp.into, "b_gate": mlp.into if gated else None}
        layer = layers.get(name, mlp.out)
        return _bias(body, block, layer, "layer" if name != "b_gate" else "gate")
    if heads is None:
        return ": there is no attention in this block"
    if name == "b_O":
        return _bias(body, block, heads.out, "output projection")
    return _bias_of_heads(body, weights, block, heads, _LETTERS[name])


def _bias_of_heads(body: Body, weights: Weights, block: Block, heads: Heads, letter: str) -> str:
    """The line that reads the bias of queries, keys or values, `(head, d_head)`."""
    path = heads.projections.get(letter)
    line = _bias(body, block, path, f"layer for its {letter}")
    if path is None or not line.startswith("block."):
        return line
    if list(heads.projections.values()).count(path) == 1:
        return f"{line}.unflatten(0, {weights._count(heads, letter)})"
    if not body.model.loaded:
        return f": write `model.load()`, and ask again: one layer makes q, k and v in `{path}`"
    found = head_projection(weights, block, heads, letter)
    if isinstance(found, str):
        return f": {found[:-1]}"
    columns = found.columns.cpu()
    count, size = columns.shape
    bias: Any = body.model.modules[path].bias
    first, total = int(columns[0, 0]), bias.numel()
    if torch.equal(columns, first + torch.arange(count * size).view(count, size)):
        return f"{line}[{first}:{first + count * size}].unflatten(0, {(count, size)})"
    step = total // count
    if torch.equal(columns, first + step * torch.arange(count)[:, None] + torch.arange(size)):
        return f"{line}.unflatten(0, {(count, step)})[:, {first}:{first + size}]"
    return f": it is among the entries of `{_written('model.load()', path)}.bias`"


def _bias(body: Body, block: Block, path: str | None, what: str) -> str:
    return _whole_bias(body, path, what, "block", block.path)


def _whole_bias(body: Body, path: str | None, what: str, begin: str, inside: str) -> str:
    """The line that reads the bias of a layer, or why there is none."""
    if path is None:
        return f": it has no {what}" if inside else f": this model has no {what}"
    if not isinstance(getattr(body.model.modules[path], "bias", None), torch.Tensor):
        return f": its {what}, `{_written('model', path)}`, has no bias"
    line = f"{_written(begin, path.removeprefix(inside).lstrip('.'))}.bias"
    return line if inside else f": write `{line}`"


def _positions(body: Body) -> str:
    from insitu.models.transformer_lens import position_embedding

    path = position_embedding(body)
    if path is None:
        return ": this model has no embedding of positions"
    first = getattr(body.model.modules[path], "offset", 0)  # rows that no position has
    rows = f"[{first}:]" if type(first) is int and first else ""
    return f": write `{_written('model.load()', path)}.weight{rows}`"


def _written(begin: str, path: str) -> str:
    """A path behind what it begins with, as it is written in a line."""
    names = path.split(".") if path else ()
    return begin + "".join(f"[{name}]" if name.isdecimal() else f".{name}" for name in names)
