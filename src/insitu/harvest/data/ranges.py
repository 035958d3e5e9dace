"""Ranges: consecutive sequences that become one shard, and the batches in which they are run.

Where a range ends follows from the data and the specification alone, never from batches, memory or
workers. So any process makes the same shard of it.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from insitu.graph.errors import PromptError
from insitu.graph.location import here
from insitu.harvest.data.sequences import Sequence, changed, check_skipped
from insitu.harvest.folder.shard_file import Written
from insitu.harvest.layout import Line, Place, Skipped


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive sequences that become one shard.

    Attributes:
        shard: the number of the shard.
        first_sequence: the number of its first sequence.
        sequences: its sequences.
        start: where its part of the data begins.
        stop: where that ends.
        skipped: what was skipped in it.
        last: whether nothing comes behind it.
    """

    shard: int
    first_sequence: int
    sequences: list[Sequence]
    start: Place
    stop: Place
    skipped: tuple[Skipped, ...]
    last: bool

    @property
    def tokens(self) -> int:
        """How many tokens the model is given for it."""
        return sum(len(one.ids) for one in self.sequences)

    def digest(self) -> str:
        """Returns the digest of the token ids of its sequences."""
        told = hashlib.sha256()
        for one in self.sequences:
            ids = array("i", [len(one.ids), *one.ids])
            if sys.byteorder == "big":
                ids.byteswap()
            told.update(ids.tobytes())
        return told.hexdigest()


def line_of(one: Range, written: Written, rows: int) -> Line:
    """Returns the line of a range whose shard is written.

    Args:
        one: the range.
        written: the file of its shard.
        rows: how many rows that has.
    """
    return Line(
        shard=one.shard,
        rows=rows,
        tokens=one.tokens,
        first_sequence=one.first_sequence,
        sequences=len(one.sequences),
        start=one.start,
        stop=one.stop,
        source=one.digest(),
        skipped=one.skipped,
        bytes=written.bytes,
        sha256=written.sha256,
        last=one.last,
    )


class Progress(NamedTuple):
    """How far ranges have come: where the next one begins.

    Attributes:
        shard: its number.
        sequence: the number of its first sequence.
        place: where it begins in the data.
        tokens: how many tokens come before it.
        skipped: how many documents were skipped before it.
    """

    shard: int = 0
    sequence: int = 0
    place: Place = Place(0)
    tokens: int = 0
    skipped: int = 0

    def behind(self, done: Range | Line) -> Progress:
        """Returns the progress behind a range that comes next."""
        count = done.sequences if isinstance(done, Line) else len(done.sequences)
        return Progress(
            done.shard + 1,
            done.first_sequence + count,
            done.stop,
            self.tokens + done.tokens,
            self.skipped + len(done.skipped),
        )


def ranges(
    read: Callable[[Place], Iterator[Sequence | Skipped]],
    start: Progress,
    shard_tokens: int,
    tokens: int | None,
    max_skipped: float,
) -> Iterator[Range]:
    """Yields the ranges of some data.

    Args:
        read: gives sequences from a place on.
        start: where the first range begins.
        shard_tokens: how many tokens a range has, at most one sequence more.
        tokens: how many tokens the ranges have in all; the last sequence is cut. None for all.
        max_skipped: which share of the documents may be skipped.

    Raises:
        LimitError: if more are skipped.
        PromptError: if there is no document that can be used.
        LoadError: if the data ends before the place where the first range begins.
    """
    now, found, skipped = start, list[Sequence](), list[Skipped]()
    reason, count, place, seen = "", 0, start.place, start.skipped
    later = list[Skipped]()  # of the range that comes next, if there is one
    for one in read(start.place):
        if isinstance(one, Skipped):
            seen, reason, place = seen + 1, one.reason, Place(one.document + 1)
            check_skipped(seen, place, max_skipped, reason, ended=False)
            later.append(one)
            continue
        if found and count >= shard_tokens:
            # It was kept until now: whether it is the last depends on what comes.
            made = _range(now, found, skipped, last=False)
            yield made
            now, found, skipped, count = now.behind(made), [], [], 0
        skipped, later = skipped + later, []
        # The end of packed documents comes behind those that were skipped after them.
        place = max(place, one.stop, key=lambda at: (at.document, at.token))
        left = None if tokens is None else tokens - now.tokens - count
        if left is not None and len(one.ids) >= left:
            found.append(_shortened(one, left))
            check_skipped(seen, place, max_skipped, reason, ended=True)
            yield _range(now, found, skipped, last=True)
            return
        found.append(one)
        count += len(one.ids)
    check_skipped(seen, place, max_skipped, reason, ended=True)
    if not found:
        if now.shard:
            raise changed(now.place.document)
        raise PromptError("The data has no document that can be used.", here())
    yield _range(now, found, skipped + later, last=True)


def _range(now: Progress, found: list[Sequence], skipped: list[Skipped], last: bool) -> Range:
    stop = found[-1].stop
    if last and skipped and skipped[-1].document >= stop.document:
        stop = Place(skipped[-1].document + 1)
    return Range(now.shard, now.sequence, found, now.place, stop, tuple(skipped), last)


def _shortened(one: Sequence, size: int) -> Sequence:
    """The first tokens of a sequence, as many as are still to be harvested."""
    parts, left = list[tuple[int, int]](), size
    for document, count in one.parts:
        if left:
            parts.append((document, min(count, left)))
            left -= parts[-1][1]
    return Sequence(one.ids[:size], parts, one.stop)


Group = list[int]
"""Sequences of one length, by their places in a range."""


def batches(lengths: list[int], batch_tokens: int) -> list[list[Group]]:
    """Returns in which batches sequences are run: those of like length together.

    Args:
        lengths: how many tokens each has.
        batch_tokens: how many a batch has at most, as many as if all were as long as its longest.
            A longer sequence is a batch of its own.

    Returns:
        Batches of groups of sequences of one length, which are rows of one tensor.
    """
    made, size = list[list[Group]](), 0
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[place]
        if not made or (size + 1) * length > batch_tokens:
            made.append([])
            size = 0
        batch = made[-1]
        if not batch or lengths[batch[-1][0]] != length:
            batch.append([])
        batch[-1].append(place)
        size += 1
    return made
