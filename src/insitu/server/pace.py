"""How fast an engine is, and whether it is worth a moment's wait for jobs to join a batch.

An engine that is free begins at once with what waits. But who has just had an answer often sends
the next job a moment later, and would find the engine busy. Users would form two groups: one waits
while the other runs, and batches are half as large as they could be. So an engine that has ended a
batch waits a little for those whose jobs it had, if they use to come back. Whoever comes after that
moment is begun at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from insitu.server.engines.messages import Ready
from insitu.server.engines.scheduler import Capacity
from insitu.server.records import JobRecord

BATCH_SECONDS = 1.0
"""How long jobs may take that share passes, as planned: the more they are, the less each takes."""

PIECE_SECONDS = 0.5
"""The same of a piece of a job that runs by itself: others wait for no longer."""

_MOST_JOBS = 64

MOST_SHARE = 0.25
"""For how much of the time that its last batch took an engine may wait."""

MOST_SECONDS = 0.1
_ENOUGH = 0.4  # the part of those whose jobs have ended that has to come back in that time
_FADES = 0.8  # what the past counts with each batch
_FIRST_SECONDS = 0.5  # how long a batch the speed that was measured at the start counts for
_MOST_KINDS = 64


class Speeds:
    """How many planned operations an engine does in a second, by what jobs share passes with.

    Forwards, generations and gradients take different times for as many operations, and large
    batches less than small ones.

    Args:
        first: what was measured at the start.
    """

    def __init__(self, first: float) -> None:
        self._first = first
        self._seen: dict[str, tuple[float, float]] = {}  # operations and seconds, that fade

    def saw(self, kind: str, operations: float, seconds: float) -> None:
        """Takes how long a batch took.

        Args:
            kind: what its jobs share passes with.
            operations: what was planned for it.
            seconds: how long it took.
        """
        before = self._seen.pop(kind, (self._first * _FIRST_SECONDS, _FIRST_SECONDS))
        if operations > 0 and seconds > 0:
            before = before[0] * _FADES + operations, before[1] * _FADES + seconds
        self._seen[kind] = before
        while len(self._seen) > _MOST_KINDS:
            del self._seen[next(iter(self._seen))]

    def of(self, kind: str) -> float:
        """Returns the speed of jobs.

        Args:
            kind: what they share passes with.
        """
        operations, seconds = self._seen.get(kind, (self._first, 1.0))
        return operations / seconds

    def all(self) -> Mapping[str, float]:
        """Returns the speeds of the kinds that were seen."""
        return {kind: self.of(kind) for kind in self._seen}


class Company:
    """Whether those whose jobs have ended come back at once, and how long to wait for them."""

    def __init__(self) -> None:
        self._ended = float("-inf")  # when the last batch did
        self._most = 0.0  # for how long they are waited for at most
        self._jobs = self._came = 0  # that it had, and that have come since then
        self._share = 1.0  # the part that comes back

    def batch_ended(self, now: float, seconds: float, jobs: int) -> None:
        """Takes that a batch has ended.

        Args:
            now: the time.
            seconds: how long it took.
            jobs: how many jobs it had.
        """
        if self._jobs:
            share = min(1.0, self._came / self._jobs)
            self._share = _FADES * self._share + (1 - _FADES) * share
        self._ended, self._most = now, min(MOST_SHARE * seconds, MOST_SECONDS)
        self._jobs, self._came = jobs, 0

    def came(self, now: float) -> None:
        """Takes that a job was accepted.

        Args:
            now: the time.
        """
        if now - self._ended <= self._most:
            self._came += 1

    def seconds_left(self, now: float) -> float:
        """Returns for how long it is worth to wait for jobs that can join those that wait.

        Args:
            now: the time.
        """
        if self._share < _ENOUGH or self._came >= round(self._share * self._jobs):
            return 0.0
        return max(0.0, self._ended + self._most - now)


class Pace:
    """How an engine comes on with what it is sent.

    Args:
        ready: what it has said of itself.

    Attributes:
        company: whether users come back at once.
    """

    def __init__(self, ready: Ready) -> None:
        self._budget, self._first = ready.budget, ready.speed
        self._speeds = Speeds(ready.speed)
        self.company = Company()

    def ended(self, now: float, seconds: float, jobs: Sequence[JobRecord]) -> None:
        """Takes that a batch has ended.

        Args:
            now: the time.
            seconds: how long it took.
            jobs: all of its jobs.
        """
        operations = sum(job.price.operations for job in jobs)
        self._speeds.saw(jobs[0].price.joins, operations, seconds)
        self.company.batch_ended(now, seconds, len(jobs))

    def capacity(self, joins: bool, only_short: bool) -> Capacity:
        """Returns what the engine can take when it is free.

        Args:
            joins: as of `Capacity`.
            only_short: as of `Capacity`.
        """
        return Capacity(
            self._budget,
            self._first,
            BATCH_SECONDS,
            _MOST_JOBS,
            joins,
            only_short,
            self._speeds.all(),
        )

    def seconds_to_wait(self, now: float, waiting: Sequence[JobRecord], joins: bool) -> float:
        """Returns for how long the engine waits for more jobs, 0 if it begins with those there are.

        Args:
            now: the time.
            waiting: the jobs that wait.
            joins: whether jobs share passes.
        """
        first = waiting[0]
        if not joins or not first.price.joins:
            return 0.0
        most = self.capacity(joins, False).operations_of(first)
        planned = sum(job.price.operations for job in waiting[:_MOST_JOBS])
        if len(waiting) >= _MOST_JOBS or planned >= most:
            return 0.0
        return self.company.seconds_left(now)

    def piece(self, jobs: Sequence[JobRecord]) -> int:
        """Returns how many invocations of a batch run before others get their turn; 0 for all.

        Args:
            jobs: the jobs of the batch.
        """
        (job, *others) = jobs
        price = job.price
        seconds = price.operations / self._speeds.of(price.joins)
        if others or price.invocations < 2 or seconds <= PIECE_SECONDS:
            return 0
        return max(1, int(price.invocations * PIECE_SECONDS / seconds))
