"""`Batches`: rows of a folder in exact epochs, with bounded memory and a state to go on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.layout import POSITION, ROW_TENSORS, SEQUENCE, TOKEN_IDS
from insitu.harvest.reading.batch_parts import (
    Batch,
    Where,
    at_rows,
    epochs_of,
    joined,
    mask_of,
    vectors_of,
)
from insitu.harvest.reading.shuffling import EpochOrder, check_shuffle
from insitu.harvest.reading.stored_rows import StoredRows
from insitu.methods.sites import check_count


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """A place in an epoch, and the order that it is a place in.

    Attributes:
        seed: the seed of the order.
        shuffle: how the order mixes rows.
        buffer: how many rows it mixes with each other.
        rows: how many rows it has.
        epoch: the number of the epoch.
        window: the window of it in which the next row lies.
        row: how many places of that window are done. Rows that a mask leaves out have places too,
            so that another mask can follow.
    """

    seed: int
    shuffle: bool | str
    buffer: int
    rows: int
    epoch: int = 0
    window: int = 0
    row: int = 0


class Batches:
    """Batches of rows: see `Activations.batches`.

    Args:
        columns: the rows of each site, and `token_ids`, `sequence`, `position` and `document`.
        size: as for `Activations.batches`.
        shuffle: as for `Activations.batches`.
        seed: as for `Activations.batches`.
        buffer: as for `Activations.batches`.
        where: as for `Activations.batches`.
        drop_last: as for `Activations.batches`.
        state: its `resume`: a state to go on from, or None.
    """

    def __init__(
        self,
        columns: Mapping[str, StoredRows[Any]],
        size: int,
        *,
        shuffle: Any,
        seed: Any,
        buffer: int,
        where: Where | None,
        drop_last: bool,
        state: Mapping[str, Any] | None,
    ) -> None:
        check_count("size", size)
        check_count("buffer", buffer)
        check_shuffle(shuffle, seed)
        self._columns = columns
        self._size = size
        self._where = where
        self._drop_last = drop_last
        self._state = _State(seed, shuffle, buffer, len(columns[TOKEN_IDS]))
        if state is not None:
            self._state = _resumed(state, self._state)

    @property
    def state(self) -> dict[str, Any]:
        """Where the next batch begins: a few numbers that JSON can hold, for `resume=`.

        In the body of a loop, that is behind the batch that the loop has been given.
        """
        return msgspec.to_builtins(self._state)

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next batch is of, from 0."""
        return self._state.epoch

    def __iter__(self) -> Iterator[Batch]:
        now = self._state
        shuffle: Any = now.shuffle
        order = EpochOrder(now.rows, shuffle, now.seed, now.epoch, now.buffer)
        columns, size = self._columns, self._size
        given = rows_of(columns, order, size, self._where, now.window, now.row)
        for batch, window, row in given:
            if self._drop_last and len(batch[TOKEN_IDS]) < size:
                break
            self._state = msgspec.structs.replace(now, window=window, row=row)
            yield batch
        self._state = msgspec.structs.replace(now, epoch=now.epoch + 1, window=0, row=0)

    def forever(self) -> Iterator[Batch]:
        """Gives batches of one epoch after the other, without an end.

        Raises:
            OptionError: if an epoch has no batch.
        """
        return epochs_of(self)

    def vectors(
        self,
        site: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[torch.Tensor]:
        """Gives the rows of one site as plain tensors, without an end: what trainers take.

        Args:
            site: which; None if there is but one.
            device: where to put them; None to leave them on the CPU.
            dtype: what to make of them; None for the dtype in which they are stored.

        Returns:
            An iterator of tensors `(size, width)`. Rows with several axes, such as of heads, are
            flattened.

        Raises:
            OptionError: if the site is none of these, or keeps the largest features only.
        """
        sites = self.sites
        if site is None and len(sites) > 1:
            raise OptionError(f"There are several sites: name one of {list(sites)}.", here())
        label = next(iter(sites)) if site is None else site
        if label not in sites:
            raise OptionError(f"The site {label!r} is not among those chosen: {sites}.", here())
        if not self._columns[label].dense:
            raise OptionError(
                f"{label!r} keeps the largest features only: its rows are no vectors of one width. "
                "Make them dense with `batch[label].to_dense(features)`.",
                here(),
            )
        return vectors_of(self.forever(), label, device, dtype)

    @property
    def sites(self) -> tuple[str, ...]:
        """The labels of the sites that are given."""
        return tuple(name for name in self._columns if name not in ROW_TENSORS)

    def __repr__(self) -> str:
        state = self._state
        return (
            f"<Batches of {self._size} of {state.rows:,} rows: {', '.join(self.sites)}; "
            f"epoch {state.epoch}>"
        )


def rows_of(
    columns: Mapping[str, StoredRows[Any]],
    order: EpochOrder,
    size: int,
    where: Where | None,
    window: int = 0,
    row: int = 0,
) -> Iterator[tuple[Batch, int, int]]:
    """Gives rows in an order, as batches, each with the window and the row behind it.

    Args:
        columns: as of `Batches`.
        order: the order.
        size: how many rows a batch has; the last may have fewer.
        where: as of `Activations.batches`.
        window: in which window to begin.
        row: how many places of its order to leave out.
    """
    pending: list[Batch] = []
    count = 0
    for number in range(window, order.windows):
        numbers, given = order.window(number)
        held, given, places = _read(columns, numbers, given, where)
        done = int(np.searchsorted(places, row)) if number == window else 0
        while done < len(given):
            taken = torch.from_numpy(given[done : done + size - count])
            pending.append(at_rows(held, taken))
            done, count = done + len(taken), count + len(taken)
            if count == size:
                yield joined(pending), number, int(places[done - 1]) + 1
                pending, count = [], 0
        del held  # before the next window is read, or there would be two
    if pending:
        yield joined(pending), order.windows, 0


def _read(
    columns: Mapping[str, StoredRows[Any]], numbers: Any, given: Any, where: Where | None
) -> tuple[Batch, Any, Any]:
    """A window's rows that a mask lets through, and the order in which they are given.

    The last is where each of them stands in the order of all rows of the window.
    """
    places = np.arange(len(given))
    if where is not None:
        # Of rows that are left out, nothing else is read.
        mask = mask_of(where, [columns[n][numbers] for n in (TOKEN_IDS, POSITION, SEQUENCE)])
        places = np.flatnonzero(mask[given])
        given = (mask.cumsum() - 1)[given[places]]
        numbers = numbers[mask]
    return {name: column[numbers] for name, column in columns.items()}, given, places


def _resumed(given: Mapping[str, Any], now: _State) -> _State:
    """The state to go on from, if it is of this order."""
    try:
        state = msgspec.convert(dict(given), _State)
    except (TypeError, ValueError) as error:  # msgspec's own is a `ValueError`
        raise OptionError(f"`resume` is the `state` of batches: {error}.", here()) from None
    if min(state.epoch, state.window, state.row) < 0:
        raise OptionError("`resume` is the `state` of batches: it has a negative number.", here())
    for name in ("seed", "shuffle", "buffer", "rows"):
        was, asked = getattr(state, name), getattr(now, name)
        if was != asked:
            raise OptionError(
                f"`resume` is of an order with {name} {was!r}, and this one has {asked!r}.", here()
            )
    return state
