"""What an engine was sent and how far it is, as the front sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from insitu.server.records import JobRecord


@dataclass(slots=True)
class Running:
    """A batch that an engine has.

    Attributes:
        jobs: its jobs that have not ended, by id.
        all: the jobs that it had.
        in_pieces: whether others get their turn between its pieces.
        began: whether the engine has begun it.
    """

    jobs: dict[str, JobRecord]
    all: Sequence[JobRecord]
    in_pieces: bool = False
    began: bool = False

    @property
    def tenants(self) -> frozenset[str]:
        """The tenants of all its jobs."""
        return frozenset(job.tenant for job in self.all)


@dataclass(slots=True)
class Pulse:
    """What an engine has last said of how far it is.

    Attributes:
        heard: when it last said anything.
        progress: the number that grows as it comes on.
        moved: when that number last grew.
    """

    heard: float
    progress: int = -1
    moved: float = 0.0

    def told(self, progress: int, now: float) -> None:
        """Takes how far the engine says that it is.

        Args:
            progress: the number.
            now: the time.
        """
        if progress != self.progress:
            self.progress, self.moved = progress, now

    def skip(self, seconds: float) -> None:
        """Leaves out time in which nobody could listen to the engine.

        Args:
            seconds: how long that was.
        """
        self.heard += seconds
        self.moved += seconds

    def hangs(self, now: float, silent: float, still: float = math.inf) -> bool:
        """Returns whether the engine has to be ended, as it does not come on.

        Args:
            now: the time.
            silent: for how many seconds it may say nothing.
            still: for how many seconds it may stay where it is.
        """
        return now - self.heard > silent or now - self.moved > still
