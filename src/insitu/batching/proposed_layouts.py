"""Which axes of a value are rows and which are positions, proposed from its shapes.

Shapes at a site are compared at several sizes of input. An axis that grows with the batch holds
rows, and one that grows with the length holds positions. One that grows with both holds rows and
positions flattened together. In the later steps of a generation an axis may grow with the step too.
Shapes alone can lie about flattened rows: `models/separation.py` tries by value whether a proposal
is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from insitu.batching.layout import WITH_ROWS, Axis, Entries, Layouts, TensorLayout
from insitu.graph.node import Place


class _InseparableError(Exception):
    """No layout: the value cannot be cut into the parts of its invocations."""


_INSEPARABLE = (_InseparableError, ValueError, KeyError, AttributeError)


# (batch, length) of the three probes.
# Primes, so that no product of two sizes equals another: 2 * 5, 3 * 5 and 2 * 7 tell rows and
# positions apart also where they are flattened.
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


def _layout(values: Sequence[Any], sizes: Sequence[Size], some: bool = False) -> Any:
    """The layout of a value, from the value at several sizes; with `some`, of some entries."""
    first, *others = values
    if isinstance(first, torch.Tensor):
        shapes = [value.shape for value in values]
        if len({len(shape) for shape in shapes}) > 1:
            raise _InseparableError
        found = [_axis(along, sizes) for along in zip(*shapes, strict=True)]
        axes = tuple(axis for axis, _ in found)
        bare = WITH_ROWS.isdisjoint(axes)
        # Position embeddings and masks are often there once for the whole batch.
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
    # With a step of 0 growing axes look like positions: the order says which is meant.
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
