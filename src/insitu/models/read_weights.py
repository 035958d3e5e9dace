"""Weights as a standard name gives them: to be read, with the parameter to write into instead.

Which numbers they are is found in `weights.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu.graph.read_only import read_only
from insitu.models.parts import Feedforward, Heads
from insitu.tracing.vocabulary import Entry, Given, Missing

if TYPE_CHECKING:
    from insitu.models.wrapped_module import WrappedModule

_LETTERS = {"W_Q": "q", "W_K": "k", "W_V": "v"}


def layer_of(part: Heads | Feedforward, name: str) -> str | None:
    """Returns the path of the layer that a weight belongs to, None if there is none.

    Args:
        part: the attention or the MLP.
        name: the weight's standard name, such as "W_O".
    """
    if isinstance(part, Heads):
        return part.out if name == "W_O" else part.projections.get(_LETTERS[name])
    if name == "W_out":
        return part.out
    return part.gate or part.into if name == "W_in" else part.into


def for_reading(
    model: WrappedModule, value: torch.Tensor | Missing, name: str, path: str | None
) -> Entry:
    """Returns what a standard name stands for: a weight that refuses to be written into.

    Args:
        model: the model.
        value: the weight, or why there is none.
        name: its standard name.
        path: the path of its layer.
    """
    if isinstance(value, Missing):
        return value
    parameter = ""
    if path is not None and isinstance(getattr(model.modules[path], "weight", None), torch.Tensor):
        names = path.split(".")
        line = "".join(f"[{one}]" if one.isdecimal() else f".{one}" for one in names)
        parameter = (
            " To change the model for good, write into its parameter in `torch.no_grad()`: "
            f"`model.load(){line}.weight`."
        )
    return Given(
        read_only(
            value,
            f"`{name}` is there to be read: a write into it would change the model for good, or "
            f"change nothing. To compute with other numbers, write into a copy: `{name}.clone()`."
            f"{parameter}",
        )
    )
