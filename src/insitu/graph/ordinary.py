"""Ordinary tensors, also where the user's code is in `torch.inference_mode()`.

A tensor made in that mode has no version counter and can never take part in autograd. Finding out
what a model does needs the one, gradients need the other, and values that are kept from one run to
the next must be fit for both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch

from insitu.graph.node import Graph, Row, Subgraph
from insitu.graph.structure import map_structure


@contextmanager
def ordinary_tensors() -> Generator[None, None, None]:
    """Leaves inference mode for the time of its block, with autograd on as outside of any mode.

    Elsewhere it changes nothing.
    """
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
    with ordinary_tensors():
        return map_structure(_ordinary, value)


def make_constants_ordinary(graph: Graph) -> None:
    """Puts such copies into a graph, and into the functions recorded in it.

    Args:
        graph: the graph, which is changed.
    """
    with ordinary_tensors():
        change_constants(graph, _ordinary)


def change_constants(graph: Graph, change: Callable[[Any], Any]) -> None:
    """Changes the constants of a graph, and those of the functions recorded in it.

    Args:
        graph: the graph.
        change: gives what takes the place of a constant.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, Subgraph):
            change_constants(item.graph, change)
            return Subgraph(item.graph, map_structure(leaf, item.output))
        return change(item)

    rows = graph.rows
    for index, (operation, args, kwargs, *rest) in enumerate(rows):
        args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
        rows[index] = cast(Row, (operation, args, kwargs, *rest))


def _ordinary(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.is_inference() else leaf
