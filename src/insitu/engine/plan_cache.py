"""Plans that are kept, to be found again for graphs of the same shape.

A loop records the same lines again and again, with other prompts and other tensors, and two people
record the same experiment at lines of their own. Nothing of a plan depends on any of these, so it
is made once. Errors show the lines of the graph that runs, which the plan does not hold.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from insitu.graph.node import NO_KWARGS, Carried, Function, Graph, ModuleRef, Ref, Row, Subgraph
from insitu.graph.operations import READ
from insitu.graph.structure import map_structure

Planned = TypeVar("Planned")

_MOST = 64  # plans that a model keeps

# A tensor in the place of a number equals it in some entries, and numbers of over 64 bits cannot
# be compared with tensors.
_INCOMPARABLE = (RuntimeError, OverflowError, ValueError, TypeError)

_Where = tuple[Hashable, ...]
"""What else a plan depends on, and what of the graph tells it from most others."""


class _Kept(NamedTuple, Generic[Planned]):
    """A plan, and what it is for.

    Attributes:
        outline: what the graph holds, with stand-ins for its tensors and numbers.
        saves: the nodes that it saves.
        planned: what was planned for it.
    """

    outline: dict[str, Any]
    saves: list[int]
    planned: Planned


class PlanCache(Generic[Planned]):
    """What was planned, by the graphs that it was planned for."""

    def __init__(self) -> None:
        self._by_line: dict[_Where, _Kept[Planned]] = {}
        self._by_content: dict[_Where, _Kept[Planned]] = {}
        self._last: tuple[_Where, _Kept[Any]] = (None,), _Kept({}, [], None)

    def __len__(self) -> int:
        return len(self._by_content)

    def find(
        self, key: Hashable, graph: Graph, saves: Mapping[int, object]
    ) -> tuple[_Where, Planned | None]:
        """Returns what was planned for a graph of the same shape, with the key to keep it under.

        Args:
            key: what the plan depends on beside the graph.
            graph: the graph.
            saves: holds the indices of the nodes whose values the user keeps.
        """
        where, found = self._last  # a loop finds the same again and again, and this takes no hash
        # In C: what a graph holds is told apart from others faster than it is hashed.
        try:
            if where[0] != key or found[0] != graph.__dict__:
                where = _where(key, graph)
                found = self._by_line.get(where)
                if found is None or found[0] != graph.__dict__:
                    return where, self._of_other_lines(where, key, graph, saves)
        except _INCOMPARABLE:
            return _where(key, graph), None
        _, saved, planned = found
        # The graph is alike and other values are saved: uses differ, and so does the plan.
        if saved != [*saves]:
            return where, self._of_other_lines(where, key, graph, saves)
        self._last = where, found
        return where, planned

    def keep(
        self, where: _Where, graph: Graph, saves: Mapping[int, object], planned: Planned
    ) -> None:
        """Keeps what was planned for a graph, unless graphs like it cannot be told from others.

        Args:
            where: what `find` gave.
            graph: the graph.
            saves: as of `find`.
            planned: what was planned.
        """
        try:
            rows = [_outlined(row) for row in graph.rows]
        # A function may do anything the next time, so nothing that was planned for it is certain.
        except _UnlikeAnyError:
            return
        kept = _Kept({**vars(graph), "rows": rows}, [*saves], planned)
        self._put(self._by_content, _content(where[0], graph, saves), kept)
        self._put(self._by_line, where, kept)
        self._last = where, kept

    def _of_other_lines(
        self, where: _Where, key: Hashable, graph: Graph, saves: Mapping[int, object]
    ) -> Planned | None:
        """What was planned for the same experiment at other lines, which is found at these then."""
        content = _content(key, graph, saves)
        found = self._by_content.get(content)
        try:
            if found is None or _without_lines(found.outline) != _without_lines(vars(graph)):
                return None
        except _INCOMPARABLE:
            return None
        rows = zip(found.outline["rows"], graph.rows, strict=True)
        outline = {**vars(graph), "rows": [(*row[:-1], own[-1]) for row, own in rows]}
        # Put at the end of the table, since it was of use: what was not asked for longest is
        # dropped.
        self._put(self._by_content, content, found)
        self._put(self._by_line, where, found._replace(outline=outline))
        self._last = where, self._by_line[where]
        return found.planned

    @staticmethod
    def _put(table: dict[_Where, _Kept[Any]], key: _Where, kept: _Kept[Any]) -> None:
        """Puts something at the end of a table, and drops what has become too much."""
        table.pop(key, None)
        table[key] = kept
        while len(table) > _MOST:
            table.pop(next(iter(table)), None)


def _where(key: Hashable, graph: Graph) -> _Where:
    """Where to look for what was planned for a graph at its lines."""
    rows = graph.rows
    if not rows:
        return key, 0
    *_, inputs, _, (code, instruction) = rows[-1]
    # Not the code object itself: its hash is that of all its instructions.
    if isinstance(code, CodeType):
        code = (code.co_filename, code.co_firstlineno)
    return key, len(rows), code, instruction, inputs


def _content(key: Hashable, graph: Graph, saves: Mapping[int, object]) -> _Where:
    """Where to look for what was planned for a graph at any lines."""
    steps = [row[1] if row[0] is READ else (row[0].name, row[3]) for row in graph.rows]
    return key, (*steps,), (*saves,)


def _without_lines(held: Mapping[str, Any]) -> dict[str, Any]:
    """What a graph holds, but for the lines that recorded it."""
    others = {**held, "rows": [row[:-1] for row in held["rows"]]}
    # Its values are the lines of the user's.
    if "stops" in others:
        others["stops"] = [*others["stops"]]
    return others


class _UnlikeAnyError(Exception):
    """The graph holds functions, or values of other blocks: no other can be like it."""


class _Like:
    """Stands for a tensor, and equals those of the same form."""

    __slots__ = ("form",)
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, tensor: torch.Tensor) -> None:
        self.form = _form(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Tensor) and self.form == _form(other)


class _Number:
    """Stands for a number, and equals the same of the same type.

    `True`, 1, 1.0 and a tensor of one element may all be equal, and they are something else as an
    index, as a factor and for autograd.
    """

    __slots__ = ("kind", "number")
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, number: Any) -> None:
        self.kind: Any = type(number)
        self.number = number

    def __eq__(self, other: object) -> bool:
        return type(other) is self.kind and (
            other is self.number
            or other == self.number
            or (other != other and self.number != self.number)  # NaN
        )


class _AnyGenerator:
    """Stands for a generator, and equals all of its device."""

    __slots__ = ("device",)
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Generator) and self.device == other.device


def _form(tensor: torch.Tensor) -> tuple[object, ...]:
    strides = tensor.stride() if tensor.layout is torch.strided else None
    device, dtype = tensor.device, tensor.dtype
    return (type(tensor), tensor.shape, strides, dtype, device, tensor.requires_grad)


_NUMBERS = (bool, int, float, complex)
_PLAIN = (Ref, str, type(None), ModuleRef, torch.dtype, torch.device)


@lru_cache(maxsize=1024, typed=True)
def _number(number: Any) -> _Number:
    """The stand-in for a number: one for all graphs, since a cycle of the collector visits each."""
    return _Number(number)


def _outlined(row: Row) -> Row:
    """A row with a stand-in for each tensor and each number."""
    operation, args, kwargs, inputs, nested, mark = row
    # Nothing in it differs from run to run, so the row itself is kept.
    if operation is READ or (not kwargs and all(isinstance(arg, _PLAIN) for arg in args)):
        return row
    replaced = False

    def leaf(item: Any) -> Any:
        nonlocal replaced
        if isinstance(item, torch.Tensor):
            replaced = True
            return _Like(item)
        if isinstance(item, _NUMBERS):
            replaced = True
            return _number(item)
        if isinstance(item, torch.Generator):
            replaced = True
            return _AnyGenerator(item.device)
        # What they hold would be kept as long as the plan, and compares as nothing else does.
        if isinstance(item, Function | Carried | Subgraph):
            raise _UnlikeAnyError
        return item

    args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
    return (operation, args, kwargs or NO_KWARGS, inputs, nested, mark) if replaced else row
