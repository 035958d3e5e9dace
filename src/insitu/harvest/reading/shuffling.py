"""In which order rows are given: a function of a seed and an epoch, and of nothing that happened.

An epoch is cut into windows, each of at most `buffer` rows. All of a window is read before the
first of its rows is given. So a place in an epoch is two numbers, the window and the row in it, and
to go on from there takes no replay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.harvest.reading.row_numbers import Numbers

Shuffle = Literal["full"]
"""How rows are shuffled besides `True` and `False`: "full" draws an order of all rows."""

RUN = 64
"""How many rows that follow each other are read together: with rows of 1.5 KB, 96 KB at once."""


@dataclass(frozen=True)
class EpochOrder:
    """The order of the rows of an epoch, or of the part of it that one of several readers gets.

    Attributes:
        rows: how many rows there are in all.
        shuffle: False, True or "full".
        seed: what the order is drawn from, with the epoch.
        epoch: the number of the epoch.
        buffer: how many rows a window has at most.
        reader: which of the readers this is.
        readers: among how many readers the rows are divided.
    """

    rows: int
    shuffle: bool | Shuffle
    seed: int
    epoch: int
    buffer: int
    reader: int = 0
    readers: int = 1

    @property
    def span(self) -> tuple[int, int]:
        """The part of the epoch that this reader gets. Parts differ by at most one row."""
        first = self.reader * self.rows // self.readers
        return first, (self.reader + 1) * self.rows // self.readers

    @property
    def windows(self) -> int:
        """How many windows there are."""
        first, stop = self.span
        return -(-(stop - first) // self.buffer)

    def window(self, number: int) -> tuple[Numbers, Numbers]:
        """Returns the rows of a window.

        Args:
            number: which, from 0.

        Returns:
            The numbers of its rows, rising, so that they are read in the order of the files; and
            the order in which they are given: places in the former.
        """
        first, stop = self.span
        first += number * self.buffer
        found = self._at(first, min(first + self.buffer, stop))
        if self.shuffle is False:
            return found, np.arange(len(found))
        order = np.argsort(found, kind="stable")
        if self.shuffle == "full":
            given = np.empty_like(order)
            given[order] = np.arange(len(order))
            return found[order], given
        return found[order], self.drawn(1, self.reader, number).permutation(len(found))

    def _at(self, first: int, stop: int) -> Numbers:
        """The rows from one place of the epoch to another, before windows are mixed."""
        places = np.arange(first, stop)
        if self.shuffle is False:
            return places
        if self.shuffle == "full":
            return self._runs[places]
        # The last run is shorter, and stands anywhere: what is behind it lies closer.
        runs, lacking = self._runs, -self.rows % RUN
        short = int(self._place_of_last) * RUN + RUN - lacking
        shifted = np.where(places >= short, places + lacking, places)
        return runs[shifted // RUN] * RUN + shifted % RUN

    @cached_property
    def _runs(self) -> Numbers:
        """The order of the runs; of a full shuffle, of all rows."""
        count = self.rows if self.shuffle == "full" else -(-self.rows // RUN)
        return self.drawn(0).permutation(count).astype(np.int64)

    @cached_property
    def _place_of_last(self) -> int:
        """Where in the order the last run stands, which may be short."""
        return int(np.flatnonzero(self._runs == len(self._runs) - 1)[0])

    def drawn(self, *purpose: int) -> np.random.RandomState:
        """Returns what draws for a purpose: other numbers for each.

        Of all its generators, NumPy promises only for this one the same numbers in all versions.

        Args:
            purpose: some numbers from 0.
        """
        words: list[int] = []
        for number in (self.seed, self.epoch, *purpose):
            words += [number & 0xFFFFFFFF, number >> 32]
        return np.random.RandomState(np.array(words, np.uint32))


def check_shuffle(shuffle: Any, seed: Any) -> None:
    """Refuses a `shuffle` or a `seed` that has no meaning.

    Raises:
        OptionError: if one of them has none.
    """
    if not isinstance(shuffle, bool) and not (isinstance(shuffle, str) and shuffle == "full"):
        raise OptionError(f'`shuffle` is True, False or "full", not {shuffle!r}.', here())
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise OptionError(f"`seed` is a whole number from 0 to 2**64 - 1, not {seed!r}.", here())
