"""Rows of one tensor over all shards, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from insitu.graph.errors import OptionError, ShapeError
from insitu.graph.location import here
from insitu.harvest.reading.mapped_shard import ROW_DTYPES
from insitu.harvest.reading.opening import tensors_of_site
from insitu.harvest.reading.row_numbers import Numbers, numbers_of
from insitu.harvest.reading.shards import Shards
from insitu.harvest.specification import SiteSpecification

Taken = TypeVar("Taken")


class TopFeatures(NamedTuple):
    """The largest features of some rows, of a site that keeps no others.

    Attributes:
        values: how large they are, `(rows, k)`, or `(k,)` of one row.
        indices: which features they are, int32, of the same shape.
    """

    values: torch.Tensor
    indices: torch.Tensor

    def to_dense(self, features: int) -> torch.Tensor:
        """Returns all features, 0 where one was not among the largest.

        Args:
            features: how many there are.

        Returns:
            `(rows, features)`, in the dtype of the values.

        Raises:
            ShapeError: if there is a feature of a higher number.
        """
        numbers = self.indices.long()
        if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < features:
            raise ShapeError(
                f"There are features {int(numbers.min())} to {int(numbers.max())}, which do not "
                f"fit into {features}.",
                here(),
            )
        empty = self.values.new_zeros(*self.values.shape[:-1], features)
        # Added, not put: a feature of size 0 may be listed twice where fewer than k are there.
        return empty.scatter_add(-1, numbers, self.values)


class StoredRows(Generic[Taken]):
    """Rows of a site, or of a tensor such as `token_ids`: `rows[index]` reads them.

    An index is a number, a slice, a list or tensor of numbers, or a mask. The result is a copy, and
    only these rows are read.

    Args:
        shards: where they are.
        names: the tensors in the shards.
        dtypes: the dtype of each of them.
        shape: of one row.
        made: makes the result of an index from one tensor for each name.
    """

    def __init__(
        self,
        shards: Shards,
        names: tuple[str, ...],
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int, ...],
        made: Callable[..., Taken],
    ) -> None:
        self._shards = shards
        self._names = names
        self._dtypes = dtypes
        self._row = shape
        self._made = made

    def __len__(self) -> int:
        return self._shards.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows together, `(rows, ...)`."""
        return (len(self), *self._row)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self._dtypes[0]

    @property
    def dense(self) -> bool:
        """Whether a row is one tensor, and not the largest of its features."""
        return len(self._names) == 1

    def __getitem__(self, index: Any) -> Taken:
        found = numbers_of(index, len(self))
        one = isinstance(found, int)
        numbers = range(found, found + 1) if isinstance(found, int) else found
        self._check(numbers)
        taken = [
            self._taken(name, dtype, numbers)
            for name, dtype in zip(self._names, self._dtypes, strict=True)
        ]
        return self._made(*(tensor[0] if one else tensor for tensor in taken))

    def __iter__(self) -> Any:
        # Python would fall back to `self[0]`, `self[1]`, ...: a call for each row.
        raise OptionError(
            "Rows are read with an index, `rows[:1000]`, and all of them in "
            "`activations.batches(size)`.",
            here(),
        )

    def __repr__(self) -> str:
        return f"<Rows of {self._names[0]}: {self.shape}, {str(self.dtype).removeprefix('torch.')}>"

    def _check(self, numbers: range | Numbers) -> None:
        """Raises if a shard of these rows is broken: a folder may say that rows are huge."""
        starts = self._shards.starts
        if isinstance(numbers, range) and len(numbers):
            ends = (
                np.searchsorted(
                    starts, [min(numbers[0], numbers[-1]), max(numbers[0], numbers[-1])], "right"
                )
                - 1
            )
            self._shards.check(range(int(ends[0]), int(ends[1]) + 1))
        elif len(numbers):
            self._shards.check(np.unique(np.searchsorted(starts, numbers, "right") - 1).tolist())

    def _taken(self, name: str, dtype: torch.dtype, numbers: range | Numbers) -> torch.Tensor:
        made = torch.empty(len(numbers), *self._row, dtype=dtype)
        if not made.numel():
            return made
        # NumPy has no bfloat16, and takes rows of bytes as fast.
        target = made.view(torch.uint8) if self._row else made[:, None].view(torch.uint8)
        flat = target.reshape(len(numbers), -1).numpy()
        if isinstance(numbers, range):
            self._copy_range(name, numbers, flat)
        else:
            self._copy(name, numbers, flat)
        return made

    def _copy_range(self, name: str, numbers: range, target: np.ndarray[Any, Any]) -> None:
        starts = self._shards.starts
        ordered = numbers if numbers.step > 0 else numbers[::-1]
        target = target if numbers.step > 0 else target[::-1]
        done = 0
        while done < len(ordered):
            shard = int(np.searchsorted(starts, ordered[done], "right")) - 1
            start, stop = int(starts[shard]), int(starts[shard + 1])
            count = len(range(ordered[done], min(stop, ordered.stop), ordered.step))
            source = self._shards.opened(shard).bytes_of(name)
            part = source[ordered[done] - start :: ordered.step][:count]
            target[done : done + count] = part
            done += count

    def _copy(self, name: str, numbers: Numbers, target: np.ndarray[Any, Any]) -> None:
        starts = self._shards.starts
        of_shard = np.searchsorted(starts, numbers, "right") - 1
        if (of_shard[1:] >= of_shard[:-1]).all():  # each shard's rows lie side by side
            edges = [0, *(np.flatnonzero(np.diff(of_shard)) + 1).tolist(), len(numbers)]
            for first, stop in pairwise(edges):
                shard = int(of_shard[first])
                source = self._shards.opened(shard).bytes_of(name)
                own = numbers[first:stop] - starts[shard]
                np.take(source, own, axis=0, out=target[first:stop], mode="clip")
            return
        for shard in np.unique(of_shard).tolist():
            places = np.flatnonzero(of_shard == shard)
            source = self._shards.opened(shard).bytes_of(name)
            target[places] = np.take(source, numbers[places] - starts[shard], axis=0)


def rows_of_site(shards: Shards, site: SiteSpecification) -> StoredRows[Any]:
    """Returns the rows of a site: tensors, or `TopFeatures`.

    Args:
        shards: where they are.
        site: which site.
    """
    tensors = tensors_of_site(site)
    dtypes = tuple(dtype for dtype, _ in tensors.values())
    made: Callable[..., Any] = _alone if site.features is None else TopFeatures
    return StoredRows(shards, tuple(tensors), dtypes, site.shape, made)


def rows_of_place(shards: Shards, name: str) -> StoredRows[torch.Tensor]:
    """Returns what says where rows come from.

    Args:
        shards: where it is.
        name: one of `ROW_TENSORS`.
    """
    return StoredRows(shards, (name,), (ROW_DTYPES[name],), (), _alone)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
