"""Which axes of a value are batch rows and which are positions, and how to cut along them.

Proposed by comparing what passes a site at three sizes of input: an axis that grows with the
batch holds rows, one that grows with the length holds positions, one that grows with both holds
rows and positions flattened together. Shapes alone can lie about the last; whether a proposal is
right is found out elsewhere, by value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, cast

import torch

from insitu.graph.errors import InsituError
from insitu.graph.node import Site
from insitu.graph.structure import map_structure
from insitu.runtime.hooks import Place

# (batch, length) of the three probes.
SIZES = ((2, 5), (3, 5), (2, 7))


class Axis(Enum):
    """What an axis of a value counts."""

    FIXED = "features, heads or whatever else does not depend on the batch"
    ROWS = "rows of the batch"
    POSITIONS = "positions"
    SHARED = "one row that holds for all rows of the batch"
    BOTH = "rows and positions, flattened"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The axes of one tensor.

    Attributes:
        axes: what each of them counts.
        sizes: how long they were when that was found. Those that are fixed must be as long in
            every run: some models pad a prompt to blocks of a size of their own.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...] = field(default=(), compare=False)

    @property
    def writable(self) -> bool:
        """Whether each row of the batch has a part of its own, or can be given one."""
        return not _WITH_ROWS.isdisjoint(self.axes)


_WITH_ROWS = frozenset([Axis.ROWS, Axis.BOTH, Axis.SHARED])


class _InseparableError(Exception):
    """No layout: the value cannot be cut into the parts of its invocations."""


class UnexpectedShapeError(InsituError):
    """A value does not have the layout that values of its site had."""


class Part(NamedTuple):
    """Where one invocation lies in a batch.

    Attributes:
        rows: its rows.
        positions: its positions in each of them.
        batch: rows in the whole batch.
        length: positions in the whole batch.
    """

    rows: slice
    positions: slice
    batch: int
    length: int

    @property
    def spans_length(self) -> bool:
        """Whether it has no padding beside it."""
        return self.positions.stop - self.positions.start == self.length


Layouts = Mapping[Place, Any]
"""Layouts by place; what cannot be cut has none."""


def find_layouts(seen: Sequence[Mapping[Place, Any]]) -> Layouts:
    """Returns the layouts that sites have by their shapes.

    Args:
        seen: what passed the sites at the three sizes of `SIZES`, in this order.
    """
    layouts: dict[Place, Any] = {}
    first, *others = seen
    for place, value in first.items():
        if all(place in other for other in others):
            try:
                layouts[place] = _layout(value, *(other[place] for other in others))
            except (_InseparableError, ValueError, KeyError, AttributeError):
                continue  # of other structure, or with a size that depends on something else
    return layouts


def cut(site: Site, value: Any, layout: Any, part: Part) -> Any:
    """Returns an invocation's part of a value.

    Args:
        site: where the value arrived.
        value: what arrived.
        layout: the site's layout.
        part: where the invocation lies.

    Raises:
        UnexpectedShapeError: if the value does not have the layout.
    """
    if isinstance(layout, TensorLayout) and isinstance(value, torch.Tensor):
        return _cut_tensor(site, value, layout, part)
    if isinstance(layout, tuple) and isinstance(value, tuple):
        items = cast("tuple[Any, ...]", value)
        inners = cast("tuple[Any, ...]", layout)
        if len(items) == len(inners):
            pairs = zip(items, inners, strict=True)
            return tuple(cut(site, item, inner, part) for item, inner in pairs)
    if isinstance(layout, dict) and isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        kind = cast(Any, type(entries))
        inner = cast("dict[str, Any]", layout)
        if entries.keys() == inner.keys():
            return kind({name: cut(site, entries[name], inner[name], part) for name in entries})
    if layout is None and not isinstance(value, torch.Tensor):
        return cast(Any, value)
    raise _unexpected(site, value)


def put(site: Site, value: Any, layout: Any, part: Part, own: Any) -> None:
    """Fills an invocation's part of a value with another.

    Args:
        site: where the value arrived.
        value: a copy of what arrived, widened; its tensors are written to.
        layout: the site's layout.
        part: where the invocation lies.
        own: what to put there.
    """
    if isinstance(layout, TensorLayout):
        if Axis.BOTH not in layout.axes:
            _cut_tensor(site, value, layout, part, all_rows=True).copy_(own)
            return
        axis = layout.axes.index(Axis.BOTH)
        apart = value.unflatten(axis, (part.batch, part.length))
        rows = part.rows.stop - part.rows.start
        lead = (slice(None),) * axis
        apart[(*lead, part.rows, part.positions)] = own.unflatten(axis, (rows, -1))
    elif isinstance(layout, tuple):
        inners = cast("tuple[Any, ...]", layout)
        for item, inner, mine in zip(value, inners, own, strict=True):
            put(site, item, inner, part, mine)
    elif isinstance(layout, dict):
        for name, inner in cast("dict[str, Any]", layout).items():
            put(site, value[name], inner, part, own[name])


def leaves(layout: Any) -> list[TensorLayout]:
    """Returns the layouts of the tensors of a value."""
    if isinstance(layout, TensorLayout):
        return [layout]
    if isinstance(layout, tuple):
        inner = cast("tuple[Any, ...]", layout)
    else:
        inner = tuple(cast("dict[str, Any]", layout).values()) if isinstance(layout, dict) else ()
    return [leaf for item in inner for leaf in leaves(item)]


def is_shared(layout: Any) -> bool:
    """Returns whether rows of a batch have to be given something of their own to be written."""
    return any(Axis.SHARED in leaf.axes for leaf in leaves(layout))


def widened(value: Any, layout: Any, batch: int) -> Any:
    """Returns a value in which what all rows share is there once for each, in memory of its own.

    Args:
        value: the value.
        layout: its layout.
        batch: how many rows there are.
    """
    if isinstance(layout, TensorLayout):
        if Axis.SHARED not in layout.axes or value.shape[0] == batch:
            return value
        return value.expand(batch, *value.shape[1:]).clone()
    if isinstance(layout, tuple):
        pairs = zip(value, cast("tuple[Any, ...]", layout), strict=True)
        return tuple(widened(item, inner, batch) for item, inner in pairs)
    if isinstance(layout, dict):
        inner = cast("dict[str, Any]", layout)
        kind = cast(Any, type(value))
        return kind({name: widened(value[name], inner[name], batch) for name in inner})
    return value


def spread(value: Any, layout: Any, positions: Sequence[int] | slice, length: int) -> Any:
    """Returns a value with all positions, from one that has only some of them.

    What stands at the others is nothing in particular: it must not be looked at.

    Args:
        value: the value.
        layout: its layout.
        positions: which positions it has, in their order.
        length: how many there are in all.

    Raises:
        ValueError: if its positions do not have one axis of their own.
    """
    if isinstance(layout, TensorLayout):
        if Axis.POSITIONS not in layout.axes and Axis.BOTH not in layout.axes:
            return value
        axis = layout.axes.index(Axis.POSITIONS)
        if Axis.POSITIONS in layout.axes[axis + 1 :]:
            raise ValueError("a pair of positions is not left out with one of them")
        shape = list(value.shape)
        shape[axis] = length
        if value.shape[axis] == 1:
            return value.expand(shape)
        whole = value.new_empty(shape)
        whole[(*(_ALL,) * axis, positions)] = value
        return whole
    if isinstance(layout, tuple):
        inners = cast("tuple[Any, ...]", layout)
        pairs = zip(value, inners, strict=True)
        return tuple(spread(item, inner, positions, length) for item, inner in pairs)
    if isinstance(layout, dict):
        inner = cast("dict[str, Any]", layout)
        kind = cast(Any, type(value))
        return kind({name: spread(value[name], inner[name], positions, length) for name in inner})
    return value


def _layout(first: Any, more_rows: Any, longer: Any) -> Any:
    """The layout of a value, from the value at the three sizes."""
    if isinstance(first, torch.Tensor):
        shapes = (first.shape, more_rows.shape, longer.shape)
        if len({len(shape) for shape in shapes}) > 1:
            raise _InseparableError
        axes = tuple(_axis(*sizes) for sizes in zip(*shapes, strict=True))
        has_rows = Axis.ROWS in axes or Axis.BOTH in axes
        if not has_rows and len(axes) > 1 and first.shape[0] == 1 and axes[0] is Axis.FIXED:
            axes = (Axis.SHARED, *axes[1:])
        return TensorLayout(axes, tuple(first.shape))
    if type(first) is tuple:
        values = cast("tuple[Any, ...]", first)
        return tuple(_layout(*items) for items in zip(values, more_rows, longer, strict=True))
    if isinstance(first, Mapping):
        entries = cast("Mapping[str, Any]", first)
        return {name: _layout(entries[name], more_rows[name], longer[name]) for name in entries}
    constant = first is None or isinstance(first, bool | int | float | str)
    if constant and first == more_rows == longer:
        return None
    raise _InseparableError


def _axis(first: int, more_rows: int, longer: int) -> Axis:
    (batch, length), (batch_2, _), (_, length_2) = SIZES
    kinds = {
        (first, first, first): Axis.FIXED,
        (batch, batch_2, batch): Axis.ROWS,
        (length, length, length_2): Axis.POSITIONS,
        (batch * length, batch_2 * length, batch * length_2): Axis.BOTH,
    }
    if (first, more_rows, longer) not in kinds:
        raise _InseparableError
    return kinds[first, more_rows, longer]


def _cut_tensor(
    site: Site, value: torch.Tensor, layout: TensorLayout, part: Part, all_rows: bool = False
) -> torch.Tensor:
    axes, (rows, positions, batch, length) = layout.axes, part
    shape = value.shape
    if len(shape) != len(axes):
        raise _unexpected(site, value)
    key: list[slice] = []
    flat: int | None = None
    for at, axis in enumerate(axes):
        if axis is Axis.FIXED:
            if shape[at] != layout.sizes[at]:
                raise _unexpected(site, value)
            key.append(_ALL)
            continue
        if axis is Axis.SHARED and shape[at] == 1:
            key.append(_ALL)
            continue
        size = length
        if axis is Axis.ROWS:
            size = batch
            key.append(rows)
        elif axis is Axis.SHARED:  # widened: alone, it would be there once
            size = batch
            key.append(rows if all_rows else slice(rows.start, rows.start + 1))
        elif axis is Axis.POSITIONS:
            key.append(positions)
        else:
            size, flat = batch * length, at
        if shape[at] != size:
            raise _unexpected(site, value)
    if flat is None:
        return value[tuple(key)]
    apart = cast(Any, value).unflatten(flat, (batch, length))
    return apart[(*(_ALL,) * flat, rows, positions)].flatten(flat, flat + 1)


_ALL = slice(None)


def _unexpected(site: Site, value: Any) -> UnexpectedShapeError:
    shapes = map_structure(lambda x: tuple(getattr(x, "shape", ())), value)
    return UnexpectedShapeError(
        f"What arrived at `{site}` (shapes {shapes}) cannot be cut into the parts of the "
        "invocations. Give each prompt a block of its own."
    )
