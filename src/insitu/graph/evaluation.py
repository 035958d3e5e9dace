"""What the arguments of a node stand for, and graphs that are computed at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from insitu.graph.node import Carried, Function, ModuleRef, Ref, Subgraph, WeightRef
from insitu.graph.operations import INPUT
from insitu.graph.structure import map_structure


def meaning(item: Any, values: Any, module: Callable[[str], Callable[..., Any]]) -> Any:
    """Returns what a leaf of a node's arguments stands for.

    Args:
        item: the leaf.
        values: values of the nodes, by index.
        module: gives the model's module with a path.
    """
    kind = cast(Any, type(item))
    if kind is Ref:
        return values[item.index]
    if kind is ModuleRef:
        return module(item.path)
    if kind is WeightRef:
        return cast(Any, module("")).get_parameter(item.path)
    if kind is Carried:
        return item.cell.content
    if kind is Function:
        return item.function
    if kind is Subgraph:
        return partial(_call, item, module)
    return item


def _call(subgraph: Subgraph, module: Callable[[str], Callable[..., Any]], *inputs: Any) -> Any:
    return evaluate(subgraph, inputs, module)


def evaluate(
    subgraph: Subgraph, inputs: tuple[Any, ...], module: Callable[[str], Callable[..., Any]]
) -> Any:
    """Computes a graph of its own.

    Args:
        subgraph: the graph.
        inputs: what it is called with.
        module: as of `meaning`.
    """
    values: list[Any] = []

    def leaf(item: Any) -> Any:
        return meaning(item, values, module)

    for operation, args, kwargs, *_ in subgraph.graph.runnable():
        if operation is INPUT:
            values.append(inputs[args[0]])
            continue
        args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
        values.append(operation.function(*args, **kwargs))
    return map_structure(leaf, subgraph.output)
