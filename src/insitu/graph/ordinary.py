"""Ordinary tensors, also where the user's code is in `torch.inference_mode()`.

What is made in that mode has no version counter and can never take part in autograd. Finding out
what a model does needs the one, gradients need the other, and what is kept from one run to the
next must be fit for both.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch

from insitu.graph.node import Row
from insitu.graph.structure import map_structure


@contextmanager
def ordinary_tensors() -> Generator[None, None, None]:
    """Leaves inference mode for the time of its block; elsewhere it changes nothing."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False):
        yield


def made_ordinary(value: Any) -> Any:
    """Returns a value with copies in the place of tensors that were made in inference mode.

    Args:
        value: any structure.
    """
    return map_structure(_ordinary, value)


def row_of_ordinary(row: Row) -> Row:
    """Returns a row of a graph with such copies in the place of its constants."""
    operation, args, kwargs, inputs, nested, mark = row
    args, kwargs = cast("tuple[Any, Any]", made_ordinary((args, dict(kwargs))))
    return operation, args, kwargs, inputs, nested, mark


def _ordinary(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf
