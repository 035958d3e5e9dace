"""How a batch's value is cut into the parts of its invocations, along rows and positions.

Which axes of a value hold these is proposed in `proposed_layouts.py`.
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
        return not WITH_ROWS.isdisjoint(self.axes)


WITH_ROWS = frozenset([Axis.ROWS, Axis.BOTH, Axis.BOTH_GROWING, Axis.SHARED])
_FLAT = (Axis.BOTH, Axis.BOTH_GROWING)


class Entries(dict[str, Any]):
    """The layouts of those entries of a mapping that can be cut: a cache, for one, cannot."""


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
        # Entries that cannot be cut, such as a cache, are left out of what the invocation sees.
        some = isinstance(layout, Entries) and entries.keys() >= inner.keys()
        if some or entries.keys() == inner.keys():
            return kind({name: cut(site, entries[name], inner[name], part) for name in inner})
    # A constant, such as a flag, is the same for all.
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

    def fill(layout: TensorLayout, whole: Any, own: Any) -> None:
        axis = flat_axis(layout)
        # No gradient goes back through padding: what is written may be no finite number, and then
        # attention makes NaN of the zeros that come from there.
        padded = whole.requires_grad and not part.spans_length
        # Rows and positions have axes of their own: a slice of the value is the part.
        if axis is None:
            if padded and Axis.ROWS in layout.axes:
                all_of_it = (*[_ALL] * layout.axes.index(Axis.ROWS), part.rows)
                whole[all_of_it] = whole[all_of_it].detach()
            _cut_tensor(site, whole, layout, part, all_rows=True).copy_(own)
            return
        positions, length = part.along(layout.axes[axis])
        apart = whole.unflatten(axis, (part.batch, length))
        rows = part.rows.stop - part.rows.start
        lead = (_ALL,) * axis
        if padded:
            apart[(*lead, part.rows)] = apart[(*lead, part.rows)].detach()
        apart[(*lead, part.rows, positions)] = own.unflatten(axis, (rows, -1))

    _by_layout(fill, layout, value, own)


def _by_layout(function: Callable[..., Any], layout: Any, value: Any, *others: Any) -> Any:
    """Applies a function to the tensors of a value that have a layout; others stay as they are.

    Args:
        function: is given the layout of a tensor, the tensor, and what others have in its place.
        layout: the layout of the value.
        value: the value.
        others: values of the same structure.
    """
    if isinstance(layout, TensorLayout):
        return function(layout, value, *others)
    if isinstance(layout, tuple):
        inners = cast("tuple[Any, ...]", layout)
        items = zip(inners, value, *others, strict=True)
        return tuple([_by_layout(function, *item) for item in items])
    if isinstance(layout, dict):
        inner = cast("dict[str, Any]", layout)
        made = dict(value)
        for name in inner:
            own = [other[name] for other in others]
            made[name] = _by_layout(function, inner[name], value[name], *own)
        return cast(Any, type(value))(made)
    return value


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
    """Returns a value in which what all rows share is there once for each row.

    Parts that are widened have memory of their own. Others are returned as they are: whoever writes
    into one copies it before.

    Args:
        value: the value.
        layout: its layout.
        batch: how many rows there are.
    """

    def widen(layout: TensorLayout, whole: torch.Tensor) -> torch.Tensor:
        # It was widened before, for another row of the batch.
        if Axis.SHARED not in layout.axes or whole.shape[0] == batch:
            return whole
        # Cloned: rows of an expanded tensor are one memory, so that a write to one would reach all.
        return whole.expand(batch, *whole.shape[1:]).clone()

    return _by_layout(widen, layout, value)


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

    def widen(layout: TensorLayout, some: torch.Tensor) -> torch.Tensor:
        if Axis.POSITIONS not in layout.axes and Axis.BOTH not in layout.axes:
            return some
        axis = layout.axes.index(Axis.POSITIONS)
        # Patterns of attention have two such axes, and rows that leave out positions compute them
        # for some queries only.
        if Axis.POSITIONS in layout.axes[axis + 1 :]:
            raise ValueError("a pair of positions is not left out with one of them")
        shape = list(some.shape)
        shape[axis] = length
        # One value that holds for all positions is no position that was computed.
        if some.shape[axis] == 1:
            return some.expand(shape)
        # Nobody looks at the other positions: that is why they were left out.
        whole = some.new_empty(shape)
        whole[(*(_ALL,) * axis, positions)] = some
        return whole

    return _by_layout(widen, layout, value)


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
            # A fixed size that differs shows a layout that does not hold here: cutting on would
            # give a wrong number in silence.
            if shape[at] != layout.sizes[at] + (step if axis is Axis.CHOSEN else 0):
                raise _unexpected(site, value)
            key.append(_ALL)
            continue
        # It is there once for all rows, and so it is in a run alone.
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
