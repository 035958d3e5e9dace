"""`Failure`: what failed in a job that ran, for its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from insitu.graph.errors import InsituError


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """What failed in a job, and what is missing for it.

    Attributes:
        block: the number of the block in which it was.
        invocations: the numbers of the invocations of which nothing is there: the one that failed,
            and those that use something of it. None for a line outside of invocations.
        names: the names of the saved values that are missing.
        error: what was raised, with its line.
        part: of a joined job, the number of the job in which it was.
    """

    block: int
    invocations: Sequence[int]
    names: Sequence[str]
    error: InsituError
    part: int = 0
