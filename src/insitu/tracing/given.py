"""What a block is given, as it was where the block began."""

from __future__ import annotations

from collections import UserDict
from copy import copy
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
    return map_structure(_copy, (args, kwargs))


def _copy(item: Any) -> Any:
    if isinstance(item, UserDict):  # as tokenizers give
        made = copy(cast("UserDict[Any, Any]", item))
        made.data = map_structure(_copy, made.data)
        return made
    return clone(item)
