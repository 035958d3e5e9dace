"""Nodes written back as the Python that recorded them, for printing and for error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from insitu.graph.errors import InsituError, ShapeError
from insitu.graph.node import (
    Function,
    Graph,
    ModuleRef,
    Node,
    Ref,
    Site,
    Subgraph,
    WeightRef,
    readable,
    ref,
)
from insitu.graph.operations import (
    APPLY,
    BACKWARD,
    BY_NAME,
    COND,
    FOLD,
    GRAD,
    PUT,
    SETITEM,
    SKIP,
    WRITE,
)

_INFIX = {
    "add": "+",
    "and_": "&",
    "eq": "==",
    "floordiv": "//",
    "ge": ">=",
    "gt": ">",
    "le": "<=",
    "lshift": "<<",
    "lt": "<",
    "matmul": "@",
    "mod": "%",
    "mul": "*",
    "ne": "!=",
    "or_": "|",
    "pow": "**",
    "rshift": ">>",
    "sub": "-",
    "truediv": "/",
    "xor": "^",
}
_AUGMENTED = {f"i{name.strip('_')}": name for name in _INFIX}
_PREFIX = {"neg": "-", "pos": "+", "invert": "~"}
_DEEPEST = 8

Written = Callable[[int], str]
"""How the value of a node is written, by the node's index."""


def expression(graph: Graph, index: int, depth: int = 0, other: Written | None = None) -> str:
    """Returns a node as an expression, such as "transformer.h[3].output[0].mean(-1)".

    Args:
        graph: the graph that the node is in.
        index: which node.
        depth: how deep in a larger expression it stands; what is too deep is left out as "...".
        other: how the value of another node is written; None for as an expression itself.
    """
    if depth > _DEEPEST:
        return "..."
    node = graph[index]
    site = node.site
    if site is not None:
        return str(site)

    if other is not None and node.operation in (WRITE, SKIP, GRAD):
        return _given(node, graph, other)
    if node.operation is PUT:
        if depth:
            return expression(graph, node.inputs[0], depth)
        return _put(graph, index, other)
    if node.operation is WRITE:
        return expression(graph, node.inputs[0], depth)
    if node.operation is GRAD:
        return f"{expression(graph, node.inputs[0], depth)}.grad"
    if node.operation is SKIP:
        return str(Site(*graph[node.inputs[0]].args)._replace(kind="output"))

    def written(value: Any) -> str:
        return _written(value, graph, depth + 1, other)

    if node.operation.in_place and depth:
        return expression(graph, node.inputs[0], depth)
    args = [written(arg) for arg in node.args]
    name = node.operation.short
    if node.operation is SETITEM:
        return f"{args[0]}[{_subscript(node, graph, depth + 1, other)}] = {args[2]}"
    if name in _AUGMENTED:
        return f"{args[0]} {_INFIX[_AUGMENTED[name]]}= {args[1]}"
    if node.operation.name == "operator.getitem":
        return f"{args[0]}[{_subscript(node, graph, depth + 1, other)}]"
    if node.operation.name.startswith("operator."):
        if name in _INFIX:
            return f"({args[0]} {_INFIX[name]} {args[1]})"
        return f"{_PREFIX.get(name, name)}({args[0]})"
    if node.operation.name == "attribute":
        return f"{args[0]}.{node.args[1]}"
    if node.operation is APPLY:
        called = node.args[0]
        name = readable(called.path) if type(called) is ModuleRef else _named(called)
        args = args[1:]
        keywords = [f"{key}={written(value)}" for key, value in node.kwargs.items()]
        return f"{name}({', '.join(args + keywords)})"
    if node.operation in (COND, FOLD):
        return f"{name}({', '.join(args)})"
    keywords = [f"{key}={written(value)}" for key, value in node.kwargs.items()]
    if node.operation is BACKWARD and node.kwargs.get("accumulate") is False:
        return f"torch.autograd.grad({', '.join(args + keywords)})"
    if node.operation.name.startswith("Tensor.") or node.operation.name in ("save", "backward"):
        return f"{args[0]}.{name}({', '.join(args[1:] + keywords)})"
    return f"{node.operation.name}({', '.join(args + keywords)})"


def located(graph: Graph, index: int, error: InsituError) -> InsituError:
    """Returns an error of one of our operations with the line that recorded it.

    Args:
        graph: the graph.
        index: the node whose operation raised it.
        error: what it raised.
    """
    node = graph[index]
    alien = isinstance(error, ShapeError) and len(_invocations(graph, index)) > 1
    why = " (values of another prompt are as long as that prompt)" if alien else ""
    message = f"{error}{why}"
    if node.operation in (WRITE, SKIP):
        by = " by `skip`" if node.operation is SKIP else ""
        message = f"`{expression(graph, index)}` cannot be given this value{by}: {message}."
    return type(error)(message, node.location)


def _invocations(graph: Graph, index: int) -> set[int]:
    """The invocations whose values a node is made of."""
    found: set[int] = set()
    seen: set[int] = set()
    pending = [index]
    while pending:
        current = pending.pop()
        if current not in seen:
            seen.add(current)
            node = graph[current]
            pending.extend(node.inputs)
            if node.site is not None:
                found.add(node.site.invocation)
    return found


def _written(value: Any, graph: Graph, depth: int, other: Written | None) -> str:
    """An argument, as source."""
    kind = cast(Any, type(value))
    if kind is Ref:
        return other(value.index) if other else expression(graph, value.index, depth)
    if isinstance(value, torch.Tensor):
        return f"<{kind.__name__} {tuple(value.shape)}>"
    if kind is Function:
        return _named(value)
    if kind is WeightRef:
        return readable(value.path)
    if value is Ellipsis or kind is Subgraph:
        return "..."
    if kind in (tuple, list, torch.Size):
        items = ", ".join(
            [_written(item, graph, depth, other) for item in cast("list[Any]", value)]
        )
        if kind is list:
            return f"[{items}]"
        return f"({items},)" if len(value) == 1 else f"({items})"
    if kind is dict:
        entries = cast("dict[Any, Any]", value).items()
        return (
            f"{{{', '.join([f'{k!r}: {_written(v, graph, depth, other)}' for k, v in entries])}}}"
        )
    return repr(value)


def _put(graph: Graph, index: int, other: Written | None) -> str:
    """A write in place, as the line that recorded it: the views on the way are nodes here."""
    _, (value, steps, name, *rest), kwargs, inputs, nested, mark = graph.rows[index]
    lines = Graph([*graph.rows])
    for view, place, args, named in (*steps, (name, 0, tuple(rest), kwargs)):
        operation = BY_NAME[view]
        if isinstance(place, str):
            row = (operation, args, {**named, place: value}, inputs, nested, mark)
        else:
            args = (*args[:place], value, *args[place:])
            row = (operation, args, named, (value.index, *inputs), nested, mark)
        value = ref(len(lines.rows))
        lines.rows.append(row)

    def written(at: int) -> str:
        if other is not None and at < len(graph):
            return other(at)
        return expression(lines, at, 1, written)

    return expression(lines, value.index, 0, written)


def _given(node: Node, graph: Graph, other: Written) -> str:
    """What is put somewhere, where the values of other nodes have names."""
    place = other(node.inputs[0])
    if node.operation is GRAD:
        named = "".join(f" of {other(backward)}" for backward in node.inputs[1:])
        return f"{place}.grad{named}"
    value = _written(node.args[1], graph, 1, other)
    return f"{place} = {value}" if node.operation is WRITE else f"skip({place}, {value})"


def _named(function: Any) -> str:
    own = function.function
    return getattr(own, "__name__", type(own).__name__)


def _subscript(node: Node, graph: Graph, depth: int, other: Written | None) -> str:
    """What stands between the brackets of an indexing."""
    key = node.args[1]
    parts = [key]
    if type(key) is tuple and key:
        parts = list(cast("tuple[Any, ...]", key))
    return ", ".join([_subscript_part(part, graph, depth, other) for part in parts])


def _subscript_part(part: Any, graph: Graph, depth: int, other: Written | None) -> str:
    if not isinstance(part, slice):
        return _written(part, graph, depth, other)
    bounds = cast(Any, part)
    shown = [bounds.start, bounds.stop] + ([bounds.step] if bounds.step is not None else [])
    return ":".join(
        ["" if bound is None else _written(bound, graph, depth, other) for bound in shown]
    )
