"""What a fake run gives at a length between three others: each size is an affine function of it.

Only where it is certain. A value whose sizes, strides or contents do not follow has no general
answer, and a fake run is made when somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from insitu.engine.functions import Called
from insitu.engine.probe import Probe
from insitu.graph.fake_tensors import Fakes, on_fake_tensors
from insitu.graph.structure import map_structure, storage_of

Key = TypeVar("Key")


class _UncertainError(Exception):
    """The values at three lengths do not tell those between."""


class _Affine(NamedTuple):
    """An integer that is `slope * length + rest`."""

    slope: int
    rest: int

    def at(self, length: int) -> int:
        return self.slope * length + self.rest


class _Tensor(NamedTuple):
    """The form of a tensor: its strides are affine, or those of its axes packed in an order.

    Tensors of a value that share memory have it from one tensor, which has a number.
    """

    sizes: tuple[_Affine, ...]
    strides: tuple[_Affine, ...] | None
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    memory: tuple[int, _Affine, _Affine] | None = None  # its number, how much, and the offset

    def at(self, length: int, memories: dict[int, torch.Tensor]) -> torch.Tensor:
        sizes = [size.at(length) for size in self.sizes]
        if self.strides is None:
            strides = _packed(sizes, self.order)
        else:
            strides = [stride.at(length) for stride in self.strides]
        form: Any = {"dtype": self.dtype, "device": self.device}
        if self.memory is None:
            return torch.empty_strided(sizes, strides, **form)
        number, much, offset = self.memory
        if number not in memories:
            memories[number] = torch.empty(much.at(length), **form)
        return memories[number].as_strided(sizes, strides, offset.at(length))


class _Value(NamedTuple):
    """The form of a value: its structure, with a number for each leaf, and its leaves."""

    structure: Any
    leaves: tuple[Any, ...]

    def at(self, length: int, mode: FakeTensorMode) -> Any:
        with on_fake_tensors(mode):
            memories: dict[int, torch.Tensor] = {}
            made: list[Any] = []
            for leaf in self.leaves:
                if isinstance(leaf, _Tensor):
                    made.append(leaf.at(length, memories))
                else:
                    made.append(leaf.at(length) if isinstance(leaf, _Affine) else leaf)
        return map_structure(lambda number: made[number], self.structure)


class Interpolation(NamedTuple):
    """What fake runs give at all lengths between two.

    Attributes:
        seen: the forms of what passes each place, None for those that have no general answer.
        returned: the forms of what each module returns, None for those that have no general answer.
        called: the torch functions that were called, with the forms of arguments and result.
        moments: when each place is passed.
    """

    seen: Mapping[Any, _Value | None]
    returned: Mapping[str, _Value | None]
    called: Sequence[tuple[str, _Value, _Value]]
    moments: Mapping[Any, int]

    def at(self, length: int, run: Callable[[], Probe]) -> Probe:
        """Returns what a fake run gives at a length.

        Args:
            length: the length.
            run: makes that run, for values that have no general answer.
        """
        mode = Fakes()
        seen = _Between(self.seen, length, mode, lambda: run().seen)
        returned = _Between(self.returned, length, mode, lambda: run().returned)
        called = [
            Called(name, inputs.at(length, mode), output.at(length, mode))
            for name, inputs, output in self.called
        ]
        return Probe(seen, returned, called, self.moments)


class _Between(Mapping[Key, Any]):
    """Values at one length, each made when it is asked for."""

    def __init__(
        self,
        values: Mapping[Key, _Value | None],
        length: int,
        mode: FakeTensorMode,
        run: Callable[[], Mapping[Key, Any]],
    ) -> None:
        self._values, self._length, self._mode, self._run = values, length, mode, run
        self._made: dict[Key, Any] = {}

    def __getitem__(self, key: Key) -> Any:
        if key not in self._made:
            value = self._values[key]
            made = self._run()[key] if value is None else value.at(self._length, self._mode)
            self._made[key] = made
        return self._made[key]

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def interpolation(
    lengths: Sequence[int], probes: Sequence[Probe], thresholds: Collection[int]
) -> Interpolation | None:
    """Returns what fake runs give between those at three lengths, None if these do not say it.

    Args:
        lengths: the lengths. Their distances have no common divisor.
        probes: the fake run at each.
        thresholds: the sizes at which a model may begin to compute otherwise. If one lies between
            the sizes that an axis has at these lengths, nothing is certain.
    """
    fit = _Fit(lengths)
    first, *others = probes
    for other in others:
        if other.moments != first.moments or [*other.returned] != [*first.returned]:
            return None
        if [call.name for call in other.called] != [call.name for call in first.called]:
            return None
    seen = {place: fit.tried([one.seen[place] for one in probes]) for place in first.seen}
    returned = {path: fit.tried([one.returned[path] for one in probes]) for path in first.returned}
    try:
        called = [
            (
                calls[0].name,
                fit.value([call.inputs for call in calls]),
                fit.value([call.output for call in calls]),
            )
            for calls in zip(*(one.called for one in probes), strict=True)
        ]
    except _UncertainError:
        return None
    low, high = min(lengths), max(lengths)
    for size in fit.sizes:
        least, most = sorted((size.at(low), size.at(high)))
        if any(least <= threshold <= most for threshold in (1, *thresholds)):
            return None
    return Interpolation(seen, returned, called, first.moments)


class _Fit:
    """Finds the form of values from what they are at three lengths.

    Attributes:
        sizes: the sizes and numbers that depend on the length.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self.sizes: set[_Affine] = set()

    def tried(self, values: Sequence[Any]) -> _Value | None:
        """The form of a value, None if it is not certain."""
        try:
            return self.value(values)
        except _UncertainError:
            return None

    def value(self, values: Sequence[Any]) -> _Value:
        """The form of a value."""
        (structure, leaves), *others = map(_taken_apart, values)
        if any(repr(other) != repr(structure) for other, _ in others):
            raise _UncertainError
        rows = [*zip(leaves, *(other for _, other in others), strict=True)]
        found = [self._leaf(row) for row in rows]
        memories = [[storage_of(leaf) for leaf in row if _is_tensor(leaf)] for row in rows]
        for at, own in enumerate(memories):
            # Views of one tensor have to stay views: a write into one is seen through the other.
            if own and memories.count(own) > 1:
                found[at] = self._sharing(rows[at], found[at], memories.index(own))
            elif any({*own} & {*other} for other in memories if other is not own):
                raise _UncertainError  # shared at some lengths only
        return _Value(structure, tuple(found))

    def _sharing(self, tensors: Sequence[torch.Tensor], form: _Tensor, number: int) -> _Tensor:
        """The form of a tensor that shares memory with others of its value."""
        sizes = [one.untyped_storage().nbytes() // one.element_size() for one in tensors]
        offsets = [int(one.storage_offset()) for one in tensors]
        return form._replace(memory=(number, self._affine(sizes), self._affine(offsets)))

    def _leaf(self, leaves: Sequence[Any]) -> Any:
        first = leaves[0]
        if any(type(leaf) is not type(first) for leaf in leaves):
            raise _UncertainError
        if isinstance(first, FakeTensor):
            return self._tensor(cast("Sequence[FakeTensor]", leaves))
        if first is None or isinstance(first, bool | str | float | torch.dtype | torch.device):
            if any(leaf != first for leaf in leaves):
                raise _UncertainError
            return first
        if type(first) is int:
            return self._size(leaves)
        raise _UncertainError  # a cache, for one

    def _tensor(self, tensors: Sequence[torch.Tensor]) -> _Tensor:
        first = tensors[0]
        for tensor in tensors:
            form = (tensor.ndim, tensor.dtype, tensor.device, tensor.layout)
            if form != (first.ndim, first.dtype, first.device, torch.strided):
                raise _UncertainError
        sizes = tuple(map(self._size, zip(*(tensor.shape for tensor in tensors), strict=True)))
        strides: tuple[_Affine, ...] | None = None
        order = tuple(sorted(range(first.ndim), key=lambda axis: -first.stride(axis)))
        try:
            every = zip(*(tensor.stride() for tensor in tensors), strict=True)
            strides = tuple(map(self._affine, every))
        except _UncertainError:  # an axis lies within two that grow: a pattern of attention
            for tensor in tensors:
                if _packed(tensor.shape, order) != [*tensor.stride()]:
                    raise
        return _Tensor(sizes, strides, order, first.dtype, first.device)

    def _size(self, numbers: Sequence[int]) -> _Affine:
        found = self._affine(numbers)
        if found.slope:
            self.sizes.add(found)
        return found

    def _affine(self, numbers: Sequence[int]) -> _Affine:
        (low, *_), (number, *_) = self._lengths, numbers
        slope = (numbers[-1] - number) // (self._lengths[-1] - low)
        found = _Affine(slope, number - slope * low)
        for length, expected in zip(self._lengths, numbers, strict=True):
            if found.at(length) != expected:
                raise _UncertainError
        return found


def _taken_apart(value: Any) -> tuple[Any, list[Any]]:
    """The structure of a value, with a number for each leaf, and the leaves."""
    leaves: list[Any] = []

    def leaf(item: Any) -> int:
        leaves.append(item)
        return len(leaves) - 1

    return map_structure(leaf, value), leaves


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _packed(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """The strides of axes without gaps between them, from the outermost to the innermost."""
    strides, stride = [0] * len(sizes), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(sizes[axis], 1)
    return strides
