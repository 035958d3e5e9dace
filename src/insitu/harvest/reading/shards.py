"""The shards of a folder: which rows each has, and the few that are open."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from insitu.harvest.reading.mapped_shard import MappedShard, open_shard
from insitu.harvest.reading.opening import Contents

_OPEN = 16
"""How many shards stay mapped. Each is an open file, and a process may have only a few hundred."""


class Shards:
    """The shards of a folder. They can be used from several threads, and pickled.

    Args:
        folder: the folder.
        contents: what it says of itself.

    Attributes:
        starts: the number of the first row of each shard, and of all rows at the end, int64.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self._folder = folder
        self._contents = contents
        self._checked: set[int] = set()
        self._opened = lru_cache(_OPEN)(self._open)
        counts = [0, *(line.rows for line in contents.lines)]
        self.starts = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._contents.lines)

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return int(self.starts[-1])

    def opened(self, number: int) -> MappedShard:
        """Returns a shard.

        Raises:
            LoadError: if it is broken.
        """
        return self._opened(number)

    def check(self, numbers: Iterable[int]) -> None:
        """Raises if a shard is broken, before anything of the size of its rows is made.

        Args:
            numbers: the numbers of some shards. Each is opened once.

        Raises:
            LoadError: if one is broken.
        """
        for number in numbers:
            if number not in self._checked:
                self._opened(number)
                self._checked.add(number)

    def __reduce__(self) -> Any:
        return type(self), (self._folder, self._contents)

    def _open(self, number: int) -> MappedShard:
        return open_shard(self._folder, self._contents.specification, self._contents.lines[number])
