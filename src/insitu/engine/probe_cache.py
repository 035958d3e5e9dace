"""Fake runs that are kept: the last of them, and what they say of lengths between theirs.

A fake run takes as long as a short forward, and its values take memory. So only the last ones are
kept. Where three lengths agree, the shapes at a length between them follow by arithmetic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from math import gcd
from typing import Any, NamedTuple

import torch

from insitu.engine.interpolation import Interpolation, interpolation
from insitu.engine.probe import Call, Probe
from insitu.graph.errors import UnknownShapeError
from insitu.graph.structure import map_structure

_MOST = 16  # fake runs and interpolations that are kept: some 10 MB of GPT-2's

Result = Probe | UnknownShapeError

_Family = tuple[str, int, tuple[int, ...]]
# Longer than any prompt.
_ENDLESS = 1 << 62


class CallForm(NamedTuple):
    """A call apart from its sizes.

    Attributes:
        text: equal for calls that differ in nothing but sizes, and in which the same sizes are
            equal to each other.
        sizes: the different sizes of its tensors, in the order in which they come.
    """

    text: str
    sizes: tuple[int, ...]

    def without(self, at: int) -> _Family:
        """Returns a key that is equal for calls that differ in one size only."""
        return self.text, at, (*self.sizes[:at], *self.sizes[at + 1 :])


class _Kept(NamedTuple):
    form: CallForm
    result: Result


class _Near(NamedTuple):
    """The runs between two thresholds, by the size that they differ in."""

    low: int
    high: int
    runs: dict[int, Probe]
    walls: Collection[int]


class ProbeCache:
    """The last fake runs of a model.

    Args:
        thresholds: gives the sizes at which the model may begin to compute otherwise, such as a
            sliding window. None if they are not known: then each length has a run of its own.
    """

    def __init__(self, thresholds: Callable[[], Collection[int] | None]) -> None:
        self._thresholds = thresholds
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._between: OrderedDict[tuple[_Family, tuple[int, ...]], Interpolation | None]
        self._between = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Result | None:
        """Returns the result that was kept under a key, None if there is none."""
        found = self._kept.get(key)
        if found is None:
            return None
        _touch(self._kept, key, found)
        return found.result

    def keep(self, key: str, form: CallForm, result: Result) -> None:
        """Keeps a result, and drops the one that was not asked for longest.

        Args:
            key: what to keep it under.
            form: the form of the call.
            result: what the fake run gave.
        """
        _touch(self._kept, key, _Kept(form, result))

    def between(self, form: CallForm, run: Callable[[], Probe]) -> Probe | None:
        """Returns what a fake run would give, from runs of other sizes, None if it is not certain.

        These differ from the call in one size. One of them has a lesser and one a greater, with
        no threshold between them.

        Args:
            form: the form of the call.
            run: makes the fake run, for the places that have no general answer.
        """
        for at, size in enumerate(form.sizes):
            family = form.without(at)
            for key, found in [*self._between.items()]:
                # Strictly between: beyond the known lengths nothing is certain.
                if found is not None and key[0] == family and key[1][0] < size < key[1][-1]:
                    _touch(self._between, key, found)
                    return found.at(size, run)
            thresholds = self._thresholds() if self._alike(family, at) else None
            near = None if thresholds is None else self._near(family, at, size, thresholds)
            three = None if near is None else _three(near.runs, size)
            # An interpolation that failed is kept as None, so that it is not tried for each length
            # again.
            if near is None or three is None or (family, three) in self._between:
                continue
            found = interpolation(three, [near.runs[length] for length in three], near.walls)
            _touch(self._between, (family, three), found)
            if found is not None:
                return found.at(size, run)
        return None

    def next_size(self, form: CallForm) -> tuple[int, int] | None:
        """Returns which run would answer for many more, after that of a call: None if none would.

        Where lengths grow or shrink from call to call, none lies between others. A run at twice
        or half the length ends that.

        Args:
            form: the form of the call, whose run is kept.

        Returns:
            A size of the call, and what to put in its place.
        """
        for at, size in enumerate(form.sizes):
            family = form.without(at)
            # Three runs of their own have to come first: whoever asks once need not pay for more.
            if len(self._alike(family, at)) < 3:
                continue
            thresholds = self._thresholds()
            near = None if thresholds is None else self._near(family, at, size, thresholds)
            if near is None or len(near.runs) < 3 or min(near.runs) < size < max(near.runs):
                continue
            if size == max(near.runs):
                # Doubling reaches all lengths with few runs.
                wanted = min(2 * size, near.high - 1)
            else:
                wanted = max(size // 2, near.low + 1)
            if wanted not in (size, *form.sizes):
                return size, wanted
        return None

    def _near(
        self, family: _Family, at: int, size: int, thresholds: Collection[int]
    ) -> _Near | None:
        """The runs known between the thresholds around a size, None if it is one itself."""
        if size in thresholds or size <= 1:
            return None
        low = max((wall for wall in thresholds if 1 < wall < size), default=1)
        high = min((wall for wall in thresholds if wall > size), default=_ENDLESS)
        runs = {one: run for one, run in self._alike(family, at).items() if low < one < high}
        return _Near(low, high, runs, thresholds)

    def _alike(self, family: _Family, at: int) -> dict[int, Probe]:
        """The runs of calls that differ in one of their sizes only, by that size."""
        return {
            form.sizes[at]: result
            for form, result in [*self._kept.values()]
            if isinstance(result, Probe) and at < len(form.sizes) and form.without(at) == family
        }


def form_of(call: Call, rest: str) -> CallForm:
    """Returns the form of a call.

    Args:
        call: the call.
        rest: what else a fake run depends on.
    """
    if call.has_objects():
        # What an object counts by itself, such as the length of a cache, follows no size.
        return CallForm(f"{rest} {call.signature()}", ())
    numbers: dict[int, int] = {}

    def leaf(item: Any) -> str:
        if not isinstance(item, torch.Tensor):
            return repr(item)
        # Sizes are told apart by equality only: two that are equal by chance are one here, and so
        # another form.
        which = [numbers.setdefault(size, len(numbers)) for size in item.shape]
        return f"{item.dtype}{which}"

    text = repr(map_structure(leaf, tuple(call)))
    return CallForm(f"{rest} {text}", tuple(numbers))


def _three(known: Collection[int], size: int) -> tuple[int, int, int] | None:
    """Three sizes around one whose distances have no common divisor, None if there are none.

    If a model fills sizes up to a multiple of anything, three such sizes do not agree, or they lie
    within one multiple, and so do those between.
    """
    if len(known) < 3 or not min(known) < size < max(known):
        return None
    first, *middle, last = sorted(known)
    for one in middle:
        # With a common divisor a size that is filled up to a multiple of it could pass for an
        # affine one.
        if gcd(one - first, last - one) == 1:
            return first, one, last
    return None


def resized(call: Call, size: int, wanted: int) -> Call:
    """Returns a call with another size, on tensors without data.

    Args:
        call: the call.
        size: one of the sizes of its tensors.
        wanted: what to put in its place.
    """

    def leaf(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        shape = [wanted if one == size else one for one in item.shape]
        return torch.empty(shape, dtype=item.dtype, device="meta")

    return Call(*map_structure(leaf, tuple(call)))


def _touch(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    """Puts something at the end of a table, and drops what has become too much."""
    table[key] = value
    table.move_to_end(key)
    while len(table) > _MOST:
        table.popitem(last=False)
