"""Finding again what was planned for a graph of the same shape.

A loop records the same lines again and again, with other prompts and other tensors. Nothing of a
plan depends on those, so it is made once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import CodeType
from typing import Any, Generic, TypeVar, cast

import torch

from insitu.graph.node import Carried, Function, Graph, ModuleRef, Ref, Row, Subgraph
from insitu.graph.structure import map_structure

Planned = TypeVar("Planned")

_MOST = 64  # plans that a model keeps

_Where = tuple[Hashable, ...]
"""What else a plan depends on, and what of the graph tells it from most others."""

_Kept = tuple[dict[str, Any], list[int], Any, Planned]
"""What a graph holds, without the content of its tensors; the nodes that it saves; the types of its
arguments, where those matter; and what was planned for it."""


class Plans(Generic[Planned]):
    """What was planned, by the graphs that it was planned for."""

    def __init__(self) -> None:
        self._kept: dict[_Where, _Kept[Planned]] = {}
        self._last: tuple[_Where, _Kept[Any]] = (None,), ({}, [], None, None)

    def __len__(self) -> int:
        return len(self._kept)

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
                found = self._kept.get(where)
                if found is None or found[0] != graph.__dict__:
                    return where, None
        except RuntimeError:  # a tensor in the place of a number equals it in some entries
            return _where(key, graph), None
        _, saved, kinds, planned = found
        # `True` equals 1 there, but as an index it is something else.
        if saved != [*saves] or (kinds is not None and kinds != _kinds(graph.rows)):
            return where, None
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
            outline = {**vars(graph), "rows": [_outlined(row) for row in graph.rows]}
        except _UnlikeAnyError:
            return
        kinds = _kinds(graph.rows) if graph.flags else None
        self._kept[where] = (outline, [*saves], kinds, planned)
        self._last = where, self._kept[where]
        while len(self._kept) > _MOST:
            self._kept.pop(next(iter(self._kept)), None)


def _where(key: Hashable, graph: Graph) -> _Where:
    """Where to look for what was planned for a graph."""
    rows = graph.rows
    if not rows:
        return key, 0
    *_, inputs, _, (code, instruction) = rows[-1]
    # Not the code object itself: its hash is that of all its instructions.
    if isinstance(code, CodeType):
        code = (code.co_filename, code.co_firstlineno)
    return key, len(rows), code, instruction, inputs


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


_PLAIN = (Ref, str, int, float, type(None), ModuleRef, torch.dtype, torch.device)


def _outlined(row: Row) -> Row:
    """A row with a stand-in for each tensor."""
    operation, args, kwargs, inputs, nested, mark = row
    if not kwargs and all(isinstance(arg, _PLAIN) for arg in args):
        return row

    def leaf(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return _Like(item)
        if isinstance(item, torch.Generator):
            return _AnyGenerator(item.device)
        if isinstance(item, Function | Carried | Subgraph):
            raise _UnlikeAnyError
        return item

    args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
    return (operation, args, kwargs, inputs, nested, mark)


def _kinds(rows: list[Row]) -> object:
    """The types of all positional arguments."""
    return [map_structure(type, args) for _, args, *_ in rows]
