"""Objects that hold tensors in their attributes: caches of keys and values, batches, states.

`structure.py` takes them for leaves. A model may fill such an object of the user's in a forward, so
what runs for another purpose than the user's works on a copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from insitu.graph.structure import CONSTANTS, map_structure

# These are not copied: they are code, or a model, and not what a forward is given to fill.
_SHARED = (
    *CONSTANTS,
    *(nn.Module, torch.Tensor, type, ModuleType),
    *(FunctionType, BuiltinFunctionType, MethodType),
)


class _Plain:
    """An object that has attributes and nothing else."""


def is_object(item: Any) -> bool:
    """Returns whether a leaf of a structure is an object with attributes that may hold tensors.

    Args:
        item: the leaf.
    """
    return not isinstance(item, _SHARED) and hasattr(item, "__dict__")


def map_objects(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Returns a copy of a structure with a function applied to the tensors, also within objects.

    Containers and objects are new, and an object that is there twice stays one. What cannot be
    copied, such as a lock, is the same in both.

    Args:
        change: gives what takes the place of a tensor.
        value: the structure.
    """
    made: dict[int, Any] = {}

    def leaf(item: Any) -> Any:
        if id(item) in made:
            return made[id(item)]
        if isinstance(item, torch.Tensor):
            made[id(item)] = new = change(item)
            return new
        if isinstance(item, deque):
            entries = cast("deque[Any]", item)
            return deque((map_structure(leaf, entry) for entry in entries), entries.maxlen)
        if isinstance(item, set):
            return copy(cast("set[Any]", item))
        if not is_object(item):
            return item
        try:
            new: Any = copy(item)
        except Exception:  # a class may refuse to be copied with any error
            return item
        # Before its attributes, which may refer to it.
        made[id(item)] = new
        if new is not item:
            # Not by `setattr`, which a class may have made its own.
            own: dict[str, Any] = getattr(new, "__dict__", {})
            own.update({name: map_structure(leaf, held) for name, held in own.items()})
        return new

    return map_structure(leaf, value)


def tensors_within(value: Any) -> list[torch.Tensor]:
    """Returns the tensors of a structure, also those within objects.

    Args:
        value: the structure.
    """
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_objects(note, value)
    return found


def form_of_object(item: Any) -> str:
    """Returns a text that is equal for leaves with equal constants, shapes and dtypes in them.

    Args:
        item: a leaf of a structure. Of what has no attributes it is the `repr`.
    """
    seen: dict[int, int] = {}

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return f"{item.dtype}{tuple(item.shape)}"
        if not is_object(item):
            return repr(item)
        if id(item) in seen:
            return seen[id(item)]
        seen[id(item)] = len(seen)
        kind: Any = cast(Any, type)(item)
        # Its own `repr` may say nothing of what is in it, or where it is in memory. One with slots,
        # or of a class in C, has more than its attributes.
        plain = kind.__basicsize__ == _Plain.__basicsize__ and not kind.__itemsize__
        attributes = map_structure(leaf, vars(item))
        return kind.__module__, kind.__qualname__, attributes, "" if plain else repr(item)

    return repr(leaf(item))
