"""The parts of a batch, and operations on them. Where the rows were read from does not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.reading.stored_rows import TopFeatures

Batch: TypeAlias = dict[str, Any]
"""Rows of some sites: each site under its label, `(size, ...)`, or `TopFeatures` of one that keeps
the largest features; and `token_ids`, `sequence`, `position` and `document`, `(size,)` each."""

Where: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Which rows are given: a function of `(token_ids, position, sequence)` that returns a mask."""


def mask_of(where: Where, given: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Returns which rows a function lets through, `(rows,)`.

    Args:
        where: the function.
        given: token ids, positions and sequences of the rows. The function may change them.

    Raises:
        OptionError: if what it returns is no mask.
    """
    token_ids, position, sequence = given
    mask: Any = where(token_ids, position, sequence)
    rows = len(token_ids)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != (rows,):
        found = f"{mask!r:.60}"
        if isinstance(mask, torch.Tensor):
            found = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        raise OptionError(f"`where` returns a boolean tensor ({rows},), not {found}.", here())
    return mask.cpu().numpy()


def at_rows(batch: Batch, rows: torch.Tensor) -> Batch:
    """Returns some rows of a batch, as copies.

    Args:
        batch: the batch.
        rows: their numbers, int64 `(rows,)`.
    """
    return {name: _each(v, lambda part: part.index_select(0, rows)) for name, v in batch.items()}


def between(batch: Batch, first: int, stop: int) -> Batch:
    """Returns the rows from one number to another, as copies: a view would keep all of them."""
    return {name: _each(v, lambda part: part[first:stop].clone()) for name, v in batch.items()}


def joined(parts: Sequence[Batch]) -> Batch:
    """Returns batches one behind the other, as one."""
    if len(parts) == 1:
        return parts[0]
    return {name: _concatenated([part[name] for part in parts]) for name in parts[0]}


def epochs_of(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Gives one epoch after the other, without an end.

    Args:
        batches: an iterable; each loop over it is an epoch.

    Raises:
        OptionError: if an epoch has no batch.
    """
    while True:
        some = False
        for batch in batches:
            some = True
            yield batch
        if not some:
            raise OptionError(
                "There is no batch to give: there are no rows, or `where` lets none through, or "
                "fewer than a batch has.",
                here(),
            )


def vectors_of(
    batches: Iterator[Batch],
    site: str,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> Iterator[torch.Tensor]:
    """Gives the rows of one site as plain tensors, `(size, width)`.

    Args:
        batches: the batches.
        site: which site.
        device: where to put them; None to leave them where they are.
        dtype: what to make of them; None for what they are.
    """
    for batch in batches:
        rows = batch[site]
        yield rows.reshape(len(rows), -1).to(device=device, dtype=dtype)


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, TopFeatures):
        return TopFeatures(*map(change, value))
    return change(value)


def _concatenated(values: list[Any]) -> Any:
    if isinstance(values[0], TopFeatures):
        return TopFeatures(*map(torch.cat, zip(*values, strict=True)))
    return torch.cat(values)
