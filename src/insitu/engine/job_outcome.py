"""What the run of a job gives beside saved values: what generations returned, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from insitu.graph.errors import InsituError


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a run returned.

    Attributes:
        whole: what one call on all invocations would return.
        each: each invocation's own part of it.
        parts: of a joined job, what one call on the invocations of each of its jobs would return,
            by the number of the job.
    """

    whole: Any
    each: Sequence[Any]
    parts: Mapping[int, Any] = field(default_factory=dict[int, Any])


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """What failed in a job, and the values that are missing for it.

    Attributes:
        block: the number of the block in which it was.
        invocations: the numbers of the invocations that have no values: the one that failed, and
            those that use something of it. None for a line outside of invocations.
        names: the names of the saved values that are missing.
        error: what was raised, with its line.
        part: of a joined job, the number of the job in which it was.
    """

    block: int
    invocations: Sequence[int]
    names: Sequence[str]
    error: InsituError
    part: int = 0
