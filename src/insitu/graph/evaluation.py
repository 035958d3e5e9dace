"""What the arguments of a node stand for, and graphs that are computed at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from insitu.graph.bounds import check_entries, counting, is_container
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
        function = partial(_call, item, module)
        function.nodes = len(item.graph)  # pyright: ignore[reportAttributeAccessIssue]
        return function
    return item


def resolved(
    args: Any, kwargs: Mapping[str, Any], values: Any, module: Callable[[str], Callable[..., Any]]
) -> Any:
    """Returns the arguments of a node, with values in the place of references.

    Args:
        args: its arguments.
        kwargs: its keyword arguments.
        values: as of `meaning`.
        module: as of `meaning`.

    Raises:
        LimitError: if structures that stand in each other grow too large.
    """
    return held_by((args, dict(kwargs)), lambda item: meaning(item, values, module))


def held_by(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """Returns a structure with values in it, which are checked if they are structures too.

    Args:
        structure: the structure.
        leaf: gives what its leaves stand for.

    Raises:
        LimitError: if it grows too large.
    """
    held: list[Any] = []

    def stands(item: Any) -> Any:
        value = leaf(item)
        if is_container(value):
            held.append(value)
        return value

    found = map_structure(stands, structure)
    if held:
        check_entries(found)
    return found


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
    counter = counting.get()
    if counter is not None:
        counter.call(len(subgraph.graph))
    for operation, args, kwargs, *_ in subgraph.graph.runnable():
        if operation is INPUT:
            values.append(inputs[args[0]])
            continue
        args, kwargs = cast("tuple[Any, Any]", resolved(args, kwargs, values, module))
        function = operation.function if counter is None else counter.inner(operation)
        values.append(function(*args, **kwargs))
    return held_by(subgraph.output, lambda item: meaning(item, values, module))
