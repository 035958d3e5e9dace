"""The same batches over a model that runs meanwhile, without a folder.

A thread runs the model ahead and mixes rows; what it has ready waits in a short queue. What the
model gives comes as ranges: mappings of tensors under the names that a shard has.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import context_for_thread, here
from insitu.harvest.layout import INDICES, POSITION, ROW_TENSORS, SEQUENCE, TOKEN_IDS, VALUES
from insitu.harvest.reading.batch_parts import (
    Batch,
    Where,
    at_rows,
    between,
    epochs_of,
    joined,
    mask_of,
    vectors_of,
)
from insitu.harvest.reading.shuffling import EpochOrder, check_shuffle
from insitu.harvest.reading.stored_rows import TopFeatures
from insitu.methods.sites import check_count

if TYPE_CHECKING:
    from typing import Self

RangeTensors: TypeAlias = Mapping[str, torch.Tensor]
"""Activations of consecutive sequences: `token_ids`, `sequence`, `position` and `document`,
`(rows,)`, and each site under its label, `(rows, *shape)`, or `label/values` and `label/indices`.
"""

Ranges: TypeAlias = Callable[[], Iterator[RangeTensors]]
"""Begins an epoch: a function that returns the ranges of the data from its start. It is called in
the thread that runs the model, and its iterator is closed if the epoch is not used to its end."""

_END = object()


class LiveBatches:
    """Batches of rows of a model that runs meanwhile: each row once an epoch.

    `for batch in batches` is an epoch, as of `Batches`, and `forever` and `vectors` are those of
    `Batches`. There is no state to go on from: values of the model are not kept. The thread
    that runs it begins with the first batch and ends with the loop. It also ends where `close` is
    called, at the end of a `with` block, and when nothing refers to the batches any more.

    Args:
        ranges: begins an epoch.
        size: how many rows a batch has; the last of an epoch may have fewer.
        shuffle: whether rows are mixed.
        seed: what the order is drawn from, with the epoch.
        buffer: how many rows are held and mixed with each other. A range more is held while it is
            put in.
        ahead: how many batches are made ready ahead.
        where: as for `Activations.batches`.
        drop_last: as for `Activations.batches`.

    Raises:
        OptionError: if an option has no meaning.
    """

    def __init__(
        self,
        ranges: Ranges,
        size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer: int = 65_536,
        ahead: int = 4,
        where: Where | None = None,
        drop_last: bool = False,
    ) -> None:
        check_count("size", size)
        check_count("buffer", buffer)
        check_count("ahead", ahead)
        check_shuffle(shuffle, seed)
        if not isinstance(shuffle, bool):
            raise OptionError(
                "An order of all rows takes all rows: of a live model, `shuffle` is True or False.",
                here(),
            )
        self._ranges = ranges
        self._mixing = _Mixing(size, shuffle, seed, buffer, where, drop_last)
        self._ahead = ahead
        self._epoch = 0
        self._runs: weakref.WeakSet[_Ahead] = weakref.WeakSet()

    @property
    def epoch(self) -> int:
        """The number of the epoch that the next loop is, from 0."""
        return self._epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        run = _Ahead(self._mixing, self._ranges, epoch, self._ahead)
        self._runs.add(run)
        try:
            yield from run
        finally:
            run.close()

    def forever(self) -> Iterator[Batch]:
        """Gives batches of one epoch after the other, without an end.

        Raises:
            OptionError: if an epoch has no batch.
        """
        return epochs_of(self)

    def vectors(
        self,
        site: str,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Iterator[torch.Tensor]:
        """Gives the rows of one site as plain tensors, without an end: see `Batches.vectors`.

        Args:
            site: which.
            device: where to put them; None to leave them where they are.
            dtype: what to make of them; None for what they are.

        Returns:
            An iterator of tensors `(size, width)`.
        """
        return vectors_of(self.forever(), site, device, dtype)

    def close(self) -> None:
        """Ends the threads that run the model, and waits until they have ended."""
        for run in list(self._runs):
            run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Mixing:
    """Makes batches of ranges."""

    def __init__(
        self, size: int, shuffle: bool, seed: int, buffer: int, where: Where | None, drop_last: bool
    ) -> None:
        self._size = size
        self._shuffle = shuffle
        self._seed = seed
        self._buffer = buffer
        self._where = where
        self._drop_last = drop_last

    def batches(self, ranges: Iterator[RangeTensors], epoch: int) -> Iterator[Batch]:
        """Gives the rows of ranges as batches, mixed in a buffer."""
        pool: Batch = {}
        drawn = 0
        # Without a shuffle nothing has to wait.
        least = self._buffer + self._size if self._shuffle else self._size
        for one in ranges:
            pool = self._with(pool, one)
            rows = len(pool[TOKEN_IDS])
            if rows >= least:
                # Half of the buffer stays, and is mixed with what comes.
                kept = self._buffer // 2 if self._shuffle else 0
                give = max((rows - kept) // self._size, 1) * self._size
                pool, drawn = self._mixed(pool, epoch, drawn), drawn + 1
                yield from self._cut(pool, give)
                pool = between(pool, give, rows)
        if pool:
            pool = self._mixed(pool, epoch, drawn)
            yield from self._cut(pool, len(pool[TOKEN_IDS]))

    def _with(self, pool: Batch, given: RangeTensors) -> Batch:
        """A pool with the rows of a range."""
        new = _as_batch(given)
        if self._where is not None:
            own = [new[name].clone() for name in (TOKEN_IDS, POSITION, SEQUENCE)]
            new = at_rows(new, torch.from_numpy(mask_of(self._where, own)).nonzero().flatten())
        if pool and pool.keys() != new.keys():
            raise OptionError(f"A range has {sorted(new)}, and those before {sorted(pool)}.")
        return joined([pool, new] if pool else [new])

    def _mixed(self, pool: Batch, epoch: int, drawn: int) -> Batch:
        if not self._shuffle:
            return pool
        rows = len(pool[TOKEN_IDS])
        order = EpochOrder(rows, True, self._seed, epoch, max(rows, 1)).drawn(2, drawn)
        return at_rows(pool, torch.from_numpy(order.permutation(rows).astype("int64")))

    def _cut(self, pool: Batch, give: int) -> Iterator[Batch]:
        """The first rows of a pool as batches."""
        for first in range(0, give, self._size):
            stop = min(first + self._size, give)
            if stop - first == self._size or not self._drop_last:
                yield between(pool, first, stop)


class _Ahead:
    """An epoch that a thread works on ahead of whoever takes its batches."""

    def __init__(self, mixing: _Mixing, ranges: Ranges, epoch: int, ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(ahead)
        self._closed = threading.Event()
        arguments = (_work, mixing, ranges, epoch, self._queue, self._closed)
        # The thread has no reference to this object, or it would never be collected.
        self._thread = threading.Thread(
            target=context_for_thread().run, args=arguments, name="insitu-live", daemon=True
        )
        self._stopping = weakref.finalize(self, _stop, self._closed, self._queue)
        self._starting = threading.Lock()

    def __iter__(self) -> Iterator[Batch]:
        with self._starting:  # another thread may close it at any moment
            if not self._closed.is_set():
                self._thread.start()
        while not self._closed.is_set():
            item = self._queue.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread and waits for it."""
        self._stopping()
        with self._starting:
            started = self._thread.ident is not None
        if started and self._thread is not threading.current_thread():
            self._thread.join()


def _work(
    mixing: _Mixing,
    ranges: Ranges,
    epoch: int,
    ready: queue.Queue[Any],
    closed: threading.Event,
) -> None:
    """What the thread does: an epoch, batch by batch. Its errors go to whoever takes batches."""
    source: Any = None
    end: Any = _END
    try:
        source = ranges()
        for batch in mixing.batches(_until(source, closed), epoch):
            _hand_over(batch, ready, closed)
            if closed.is_set():
                break
    except BaseException as error:
        end = error
    finally:
        close = getattr(source, "close", None)
        if close is not None:
            try:
                close()  # here, where it ran: it may have blocks of a model open
            except BaseException as error:
                end = error if end is _END else end
        _hand_over(end, ready, closed)


def _until(source: Iterator[RangeTensors], closed: threading.Event) -> Iterator[RangeTensors]:
    for one in source:
        if closed.is_set():
            return
        yield one


def _hand_over(item: Any, ready: queue.Queue[Any], closed: threading.Event) -> None:
    """Puts something into a queue, or leaves it if nobody takes it any more."""
    while not closed.is_set():
        try:
            return ready.put(item, timeout=0.1)
        except queue.Full:
            continue


def _stop(closed: threading.Event, ready: queue.Queue[Any]) -> None:
    closed.set()
    while True:
        try:
            # Whoever waits for a batch is told. It is the last thing that goes in, or next to it.
            return ready.put_nowait(_END)
        except queue.Full:  # what waits is no longer wanted
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()


def _as_batch(given: RangeTensors) -> Batch:
    """A range with the features of a site together, and what says where rows come from last."""
    made: Batch = {}
    for name, tensor in given.items():
        label, _, ending = name.rpartition("/")
        if ending == VALUES and f"{label}/{INDICES}" in given:
            made[label] = TopFeatures(tensor, given[f"{label}/{INDICES}"])
        elif name not in ROW_TENSORS and not (ending == INDICES and f"{label}/{VALUES}" in given):
            made[name] = tensor
    return made | {name: given[name] for name in ROW_TENSORS}
