"""Which axes of a value are batch rows and which are positions, and how to cut along them.

Proposed by comparing what passes a site at several sizes of input: an axis that grows with the
batch holds rows, one that grows with the length holds positions, one that grows with both holds
rows and positions flattened together. In the later steps of a generation an axis may grow with
the step too. Shapes alone can lie about flattened rows; whether a proposal is right is found out
elsewhere, by value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, cast

import torch

from insitu.graph.errors import InsituError
from insitu.graph.node import Place, Site
from insitu.graph.structure import map_structure

# (batch, length) of the three probes.
SIZES = ((2, 5), (3, 5), (2, 7))


class Size(NamedTuple):
    """How large an input was at which something passed a site.

    Attributes:
        batch: how many rows it had.
        length: how many positions each of them had.
        step: in which step of a generation it was.
    """

    batch: int
    length: int
    step: int = 0


class Axis(Enum):
    """What an axis of a value counts."""

    FIXED = "features, heads or whatever else does not depend on the batch"
    ROWS = "rows of the batch"
    POSITIONS = "positions"
    SHARED = "one row that holds for all rows of the batch"
    BOTH = "rows and positions, flattened"
    GROWING = "positions of the prompt and of the tokens chosen since"
    CHOSEN = "positions of the tokens chosen since, and some more that are always there"
    BOTH_GROWING = "rows and positions that grow in each step, flattened"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The axes of one tensor.

    Attributes:
        axes: what each of them counts.
        sizes: how long they were when that was found, without the tokens chosen since. Those
            that are fixed must be as long in every run: some models pad a prompt to blocks of a
            size of their own.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...] = field(default=(), compare=False)

    @property
    def writable(self) -> bool:
        """Whether each row of the batch has a part of its own, or can be given one."""
        return not _WITH_ROWS.isdisjoint(self.axes)


_WITH_ROWS = frozenset([Axis.ROWS, Axis.BOTH, Axis.BOTH_GROWING, Axis.SHARED])
_FLAT = (Axis.BOTH, Axis.BOTH_GROWING)


class Entries(dict[str, Any]):
    """The layouts of those entries of a mapping that can be cut: a cache, for one, cannot."""


class _InseparableError(Exception):
    """No layout: the value cannot be cut into the parts of its invocations."""


_INSEPARABLE = (_InseparableError, ValueError, KeyError, AttributeError)


class UnexpectedShapeError(InsituError):
    """A value does not have the layout that values of its site had."""


class Part(NamedTuple):
    """Where one invocation lies in a batch.

    Attributes:
        rows: its rows.
        positions: its positions in each of them.
        batch: rows in the whole batch.
        length: positions in the whole batch.
        step: in which step of a generation. In each, the tokens chosen before it stand behind.
    """

    rows: slice
    positions: slice
    batch: int
    length: int
    step: int = 0

    @property
    def spans_length(self) -> bool:
        """Whether it has no padding beside it."""
        return self.positions.stop - self.positions.start == self.length

    def along(self, axis: Axis) -> tuple[slice, int]:
        """Returns the positions along an axis, and how many the whole batch has there."""
        if axis is Axis.GROWING or axis is Axis.BOTH_GROWING:
            start, stop, _ = self.positions.indices(self.length)
            return slice(start, stop + self.step), self.length + self.step
        return self.positions, self.length


Layouts = Mapping[Place, Any]
"""Layouts by place; what cannot be cut has none."""


def find_layouts(
    seen: Sequence[Mapping[Place, Any]],
    sizes: Sequence[Size] = tuple(Size(*size) for size in SIZES),
) -> Layouts:
    """Returns the layouts that sites have by their shapes.

    Args:
        seen: what passed the sites at each size.
        sizes: the sizes.
    """
    layouts: dict[Place, Any] = {}
    first, *others = seen
    for place, value in first.items():
        if all(place in other for other in others):
            try:
                values = [value, *(other[place] for other in others)]
                layouts[place] = _layout(values, sizes, some=True)
            except _INSEPARABLE:
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
        some = isinstance(layout, Entries) and entries.keys() >= inner.keys()
        if some or entries.keys() == inner.keys():
            return kind({name: cut(site, entries[name], inner[name], part) for name in inner})
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
        axis = flat_axis(layout)
        if axis is None:
            _cut_tensor(site, value, layout, part, all_rows=True).copy_(own)
            return
        positions, length = part.along(layout.axes[axis])
        apart = value.unflatten(axis, (part.batch, length))
        rows = part.rows.stop - part.rows.start
        lead = (slice(None),) * axis
        apart[(*lead, part.rows, positions)] = own.unflatten(axis, (rows, -1))
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


def flat_axis(layout: TensorLayout) -> int | None:
    """Returns which axis holds rows and positions flattened together, None if none does."""
    return next((at for at, axis in enumerate(layout.axes) if axis in _FLAT), None)


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
        rest = {name: value[name] for name in value if name not in inner}  # as they are
        return kind({**{name: widened(value[name], inner[name], batch) for name in inner}, **rest})
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


def _layout(values: Sequence[Any], sizes: Sequence[Size], some: bool = False) -> Any:
    """The layout of a value, from the value at several sizes; with `some`, of some entries."""
    first, *others = values
    if isinstance(first, torch.Tensor):
        shapes = [value.shape for value in values]
        if len({len(shape) for shape in shapes}) > 1:
            raise _InseparableError
        found = [_axis(along, sizes) for along in zip(*shapes, strict=True)]
        axes = tuple(axis for axis, _ in found)
        bare = _WITH_ROWS.isdisjoint(axes)
        if bare and len(axes) > 1 and first.shape[0] == 1 and axes[0] is Axis.FIXED:
            axes = (Axis.SHARED, *axes[1:])
        return TensorLayout(axes, tuple(size for _, size in found))
    if type(first) is tuple:
        return tuple(_layout(items, sizes) for items in zip(*values, strict=True))
    if isinstance(first, Mapping):
        return _layout_of_mapping(cast("Sequence[Mapping[str, Any]]", values), sizes, some)
    constant = first is None or isinstance(first, bool | int | float | str)
    if constant and all(first == other for other in others):
        return None
    raise _InseparableError


def _layout_of_mapping(
    values: Sequence[Mapping[str, Any]], sizes: Sequence[Size], some: bool
) -> Any:
    """The layouts of a mapping's entries, or, with `some`, of those that have one."""
    first = values[0]
    layouts: dict[str, Any] = {}
    for name in first:
        try:
            layouts[name] = _layout([value[name] for value in values], sizes)
        except _INSEPARABLE:
            if not some:
                raise
    if len(layouts) == len(first):
        return layouts
    if all(layout is None for layout in layouts.values()):
        raise _InseparableError
    return Entries(layouts)


def _axis(along: Sequence[int], sizes: Sequence[Size]) -> tuple[Axis, int]:
    """What an axis counts, from how long it is at each size; and how long it is without steps."""
    for axis, expected in _AXES.items():
        if all(size == expected(at) for size, at in zip(along, sizes, strict=True)):
            return axis, along[0]
    rest = {size - at.step for size, at in zip(along, sizes, strict=True)}
    if len(set(along)) == 1:
        return Axis.FIXED, along[0]
    if len(rest) == 1:
        return Axis.CHOSEN, rest.pop()
    raise _InseparableError


_AXES: Mapping[Axis, Callable[[Size], int]] = {
    Axis.ROWS: lambda at: at.batch,
    Axis.POSITIONS: lambda at: at.length,
    Axis.GROWING: lambda at: at.length + at.step,
    Axis.BOTH: lambda at: at.batch * at.length,
    Axis.BOTH_GROWING: lambda at: at.batch * (at.length + at.step),
}


def _cut_tensor(
    site: Site, value: torch.Tensor, layout: TensorLayout, part: Part, all_rows: bool = False
) -> torch.Tensor:
    axes, rows, batch, step = layout.axes, part.rows, part.batch, part.step
    shape = value.shape
    if len(shape) != len(axes):
        raise _unexpected(site, value)
    key: list[slice] = []
    flat: int | None = None
    for at, axis in enumerate(axes):
        if axis is Axis.FIXED or axis is Axis.CHOSEN:
            if shape[at] != layout.sizes[at] + (step if axis is Axis.CHOSEN else 0):
                raise _unexpected(site, value)
            key.append(_ALL)
            continue
        if axis is Axis.SHARED and shape[at] == 1:
            key.append(_ALL)
            continue
        if axis is Axis.ROWS:
            size = batch
            key.append(rows)
        elif axis is Axis.SHARED:  # widened: alone, it would be there once
            size = batch
            key.append(rows if all_rows else slice(rows.start, rows.start + 1))
        else:
            positions, size = part.along(axis)
            if axis in _FLAT:
                size, flat = batch * size, at
            else:
                key.append(positions)
        if shape[at] != size:
            raise _unexpected(site, value)
    if flat is None:
        return value[tuple(key)]
    positions, length = part.along(axes[flat])
    apart = cast(Any, value).unflatten(flat, (batch, length))
    return apart[(*(_ALL,) * flat, rows, positions)].flatten(flat, flat + 1)


_ALL = slice(None)


def _unexpected(site: Site, value: Any) -> UnexpectedShapeError:
    shapes = map_structure(lambda x: tuple(getattr(x, "shape", ())), value)
    return UnexpectedShapeError(
        f"What arrived at `{site}` (shapes {shapes}) cannot be cut into the parts of the "
        "invocations. Give each prompt a block of its own."
    )
