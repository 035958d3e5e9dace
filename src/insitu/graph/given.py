"""What a block is given, as it was where the block began."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, cast

import torch

from insitu.graph.structure import clone, map_structure


def copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns arguments with copies of their tensors.

    The model runs later, and a tensor given here may be filled anew for the next prompt.

    Args:
        args: the arguments by place.
        kwargs: the arguments by keyword.
    """
    if not kwargs and len(args) == 1 and type(args[0]) is torch.Tensor:  # as loops have it
        return (args[0].clone(),), kwargs
    return each(clone, (args, kwargs))


def each(change: Callable[[Any], Any], item: Any) -> Any:
    """Returns a structure with its leaves changed, also in what tokenizers give.

    Args:
        change: gives what takes the place of a leaf.
        item: the structure.
    """
    return map_structure(partial(_leaf, change), item)


def _leaf(change: Callable[[Any], Any], item: Any) -> Any:
    if isinstance(item, UserDict):
        made = copy(cast("UserDict[Any, Any]", item))
        made.data = each(change, made.data)
        return made
    if isinstance(item, torch.Tensor) and "_held" in vars(item):
        # A saved value that turned out to be no tensor, though it is of a class of tensors.
        return each(change, vars(item)["_held"])
    return change(item)
