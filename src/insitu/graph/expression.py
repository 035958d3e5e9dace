"""Nodes written back as the Python that recorded them, for printing and for error messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch

from insitu.graph.errors import InsituError, LimitError, ShapeError, at_line
from insitu.graph.node import (
    Carried,
    Earlier,
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
    PULL_BACK,
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
_MOST_PARTS = 200
"""Of an expression: nodes that use others many times would make it exponentially long."""
_LONGEST = 2000
_LONGEST_PART = 200

Written = Callable[[int], str]
"""How the value of a node is written, by the node's index."""


def expression(graph: Graph, index: int, depth: int = 0, other: Written | None = None) -> str:
    """Returns a node as an expression, such as "transformer.h[3].output[0].mean(-1)".

    A part that is too deep, too wide or too long is left out as "...".

    Args:
        graph: the graph that the node is in.
        index: which node.
        depth: how deep in a larger expression it stands.
        other: how the value of another node is written; None for as an expression itself.
    """
    return _cut(_Writer(graph, other, [_MOST_PARTS]).node(index, depth), _LONGEST)


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
    elif isinstance(error, LimitError):
        message = f"`{expression(graph, index)}` {message}."
    return at_line(error, node.location, message)


def _invocations(graph: Graph, index: int) -> set[int]:
    """The invocations whose values a node is made of."""
    sites = [graph[at].site for at in graph.needed_by(index)]
    return {site.invocation for site in sites if site is not None}


class _Writer:
    """Writes the nodes of a graph.

    Args:
        graph: the graph.
        other: as of `expression`.
        left: how many parts may still be written, shared by all that write one expression.
    """

    def __init__(self, graph: Graph, other: Written | None, left: list[int]) -> None:
        self._graph = graph
        self._other = other
        self._left = left

    def node(self, index: int, depth: int) -> str:
        """A node, so deep in a larger expression."""
        self._left[0] -= 1
        if depth > _DEEPEST or self._left[0] < 0:
            return "..."
        graph, other = self._graph, self._other
        node = graph[index]
        site = node.site
        if site is not None:
            return str(site)

        if other is not None and node.operation in (WRITE, SKIP, GRAD):
            return self._given(node, other)
        if node.operation is PUT:
            return self.node(node.inputs[0], depth) if depth else self._put(index)
        if node.operation is WRITE:
            return self.node(node.inputs[0], depth)
        if node.operation is GRAD:
            return f"{self.node(node.inputs[0], depth)}.grad"
        if node.operation is SKIP:
            return str(Site(*graph[node.inputs[0]].args)._replace(kind="output"))
        if node.operation.in_place and depth:
            return self.node(node.inputs[0], depth)
        return self._call(node, depth + 1)

    def _call(self, node: Node, depth: int) -> str:
        """An operation and its arguments."""
        args = self._listed(node.args, depth)
        name = node.operation.short
        if node.operation is SETITEM:
            return f"{args[0]}[{self._subscript(node, depth)}] = {args[2]}"
        if name in _AUGMENTED:
            return f"{args[0]} {_INFIX[_AUGMENTED[name]]}= {args[1]}"
        if node.operation.name == "operator.getitem":
            return f"{args[0]}[{self._subscript(node, depth)}]"
        if node.operation.name.startswith("operator."):
            if name in _INFIX:
                return f"({args[0]} {_INFIX[name]} {args[1]})"
            return f"{_PREFIX.get(name, name)}({args[0]})"
        if node.operation.name == "attribute":
            return f"{args[0]}.{node.args[1]}"
        if node.operation in (COND, FOLD):
            return f"{name}({', '.join(args)})"
        if node.operation is APPLY:
            called = node.args[0]
            name = readable(called.path) if type(called) is ModuleRef else _named(called)
            return f"{name}({', '.join(args[1:] + self._keywords(node, depth))})"
        if node.operation is PULL_BACK:
            return f"{name}({', '.join([readable(node.args[0].path), *args[1:]])})"
        keywords = self._keywords(node, depth)
        if node.operation is BACKWARD and node.kwargs.get("accumulate") is False:
            return f"torch.autograd.grad({', '.join(args + keywords)})"
        if node.operation.name.startswith("Tensor.") or node.operation.name in ("save", "backward"):
            return f"{args[0]}.{name}({', '.join(args[1:] + keywords)})"
        return f"{node.operation.name}({', '.join(args + keywords)})"

    def _keywords(self, node: Node, depth: int) -> list[str]:
        written = self._listed(node.kwargs.values(), depth)
        return [f"{key:.40}={value}" for key, value in zip(node.kwargs, written, strict=False)]

    def _listed(self, values: Iterable[Any], depth: int) -> list[str]:
        """Values one after the other, and "..." for those for which no room is left."""
        found: list[str] = []
        for value in values:
            if self._left[0] <= 0 and len(found) > 2:  # an operator and an assignment have three
                return [*found, "..."]
            found.append(self.value(value, depth))
        return found

    def value(self, value: Any, depth: int) -> str:
        """An argument, as source."""
        kind = cast(Any, type(value))
        if kind is Ref:
            if self._other is None:
                return self.node(value.index, depth)
            self._left[0] -= 1
            return self._other(value.index)
        self._left[0] -= 1
        if self._left[0] < 0:
            return "..."
        if isinstance(value, torch.Tensor):
            return f"<{kind.__name__} {tuple(value.shape)}>"
        if kind is Function:
            return _named(value)
        if kind is WeightRef:
            return readable(value.path)
        if value is Ellipsis or kind is Subgraph:
            return "..."
        if kind is Carried or kind is Earlier:
            return "<value of an earlier block>"
        if kind in (tuple, list, torch.Size):
            items = ", ".join(self._listed(cast("list[Any]", value), depth))
            if kind is list:
                return f"[{items}]"
            return f"({items},)" if len(value) == 1 else f"({items})"
        if kind is dict:
            entries = cast("dict[Any, Any]", value)
            written = zip(entries, self._listed(entries.values(), depth), strict=False)
            return f"{{{', '.join([f'{_plainly(k)}: {v}' for k, v in written])}}}"
        return _plainly(value)

    def _put(self, index: int) -> str:
        """A write in place, as the line that recorded it: the views on the way are nodes here."""
        graph, other = self._graph, self._other
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
            return _Writer(lines, written, self._left).node(at, 1)

        return _Writer(lines, written, self._left).node(value.index, 0)

    def _given(self, node: Node, other: Written) -> str:
        """The code of a value that is put somewhere, where the values of other nodes have names."""
        place = other(node.inputs[0])
        if node.operation is GRAD:
            named = "".join(f" of {other(backward)}" for backward in node.inputs[1:])
            return f"{place}.grad{named}"
        value = self.value(node.args[1], 1)
        return f"{place} = {value}" if node.operation is WRITE else f"skip({place}, {value})"

    def _subscript(self, node: Node, depth: int) -> str:
        """What stands between the brackets of an indexing."""
        key = node.args[1]
        parts = [key]
        if type(key) is tuple and key:
            parts = list(cast("tuple[Any, ...]", key))
        shown = [self._subscript_part(part, depth) for part in parts[:_DEEPEST]]
        return ", ".join(shown + ["..."] * (len(parts) > _DEEPEST))

    def _subscript_part(self, part: Any, depth: int) -> str:
        if not isinstance(part, slice):
            return self.value(part, depth)
        bounds = cast(Any, part)
        shown = [bounds.start, bounds.stop] + ([bounds.step] if bounds.step is not None else [])
        return ":".join(["" if bound is None else self.value(bound, depth) for bound in shown])


def _named(function: Any) -> str:
    own = function.function
    return getattr(own, "__name__", type(own).__name__)


def _plainly(value: Any) -> str:
    """A constant, as source."""
    if isinstance(value, int) and not -_PRINTED < value < _PRINTED:
        return f"<an integer of {value.bit_length()} bits>"
    if isinstance(value, str | bytes) and len(value) > _LONGEST_PART:
        return f"{value[:_LONGEST_PART]!r}..."
    return _cut(repr(value), _LONGEST_PART)


_PRINTED = 10**100


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
