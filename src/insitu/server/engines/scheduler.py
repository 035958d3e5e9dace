"""`Scheduler`: which jobs run next, together. No clock, no files, no processes.

A batch is picked when an engine is free and `pace.py` waits for no company. Interactive jobs come
before those of the class "batch", which get a tenth of the work all the same. In a class, tenants
take turns by their virtual work. The first job says what the batch is of: others join it that can
share its passes. A batch goes as deep into the model as its deepest job, so those that go as deep
as the first are taken before others of their round. A job that was passed over eight times goes
when its tenant's turn comes, alone if need be.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from insitu.remote.protocol import Priority
from insitu.server.engines.fairness import VirtualWork
from insitu.server.records import JobRecord, Tenant

MOST_PASSED_OVER = 8
"""How many times jobs that are due later are taken instead of one."""

BATCH_SHARE = 0.1
"""The part of the work that the class "batch" gets while interactive jobs wait."""

_AHEAD = 16  # how many jobs of a tenant are looked at beside those that fit into a batch
_MOST_AHEAD = 10  # how many batches of work the class "batch" can have had before its time
_ALIKE = 2.0  # jobs are alike if the one takes at most so many times the operations a position


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an engine that is free can take.

    Attributes:
        budget: the bytes that a batch may take, beside the weights. One job may be larger.
        speed: floating-point operations in a second.
        most_seconds: how long a batch may take, as planned. One job may be longer.
        most_jobs: how many jobs a batch may have.
        joins: whether jobs share passes.
        only_short: whether jobs that take longer wait, as they do between the pieces of another.
        speeds: the speed of jobs that share passes, by what `Price.joins` says, where it is known.
    """

    budget: float
    speed: float
    most_seconds: float = 0.5
    most_jobs: int = 64
    joins: bool = True
    only_short: bool = False
    speeds: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def operations(self) -> float:
        """How many operations a batch may take."""
        return self.speed * self.most_seconds

    def operations_of(self, job: JobRecord) -> float:
        """Returns how many operations a batch may take that begins with a job.

        Args:
            job: the job.
        """
        return self.speeds.get(job.price.joins, self.speed) * self.most_seconds


class Scheduler:
    """Says which jobs of a model run next. It remembers what tenants have had."""

    def __init__(self) -> None:
        self._virtual = VirtualWork()
        self._passed: dict[str, int] = {}  # how many times each job was passed over
        self._owed = 0.0  # operations that are due to the class "batch"

    @property
    def work(self) -> Mapping[str, float]:
        """The virtual work of each tenant: operations divided by its weight."""
        return self._virtual.all

    def charge(self, tenant: str, operations: float) -> None:
        """Adds to what a tenant has had: `pick` does not know whether its jobs were begun.

        Args:
            tenant: the id of the tenant.
            operations: the planned floating-point operations of a job that was.
        """
        self._virtual.charge(tenant, operations)

    def refund(self, tenant: str, operations: float) -> None:
        """Takes back what a tenant was charged for and has not had.

        Args:
            tenant: the id of the tenant.
            operations: the floating-point operations.
        """
        self._virtual.charge(tenant, -operations)

    def pick(
        self,
        waiting: Sequence[JobRecord],
        tenants: Mapping[str, Tenant],
        capacity: Capacity,
        now: float,
    ) -> list[JobRecord]:
        """Returns the jobs that a free engine runs next, together; none if none waits.

        Args:
            waiting: the queued jobs of the model, the oldest first.
            tenants: the tenants, by id.
            capacity: what the engine can take.
            now: the time, in seconds.
        """
        counts = Counter([job.tenant for job in waiting])
        weights = {one: tenants[one].weight if one in tenants else 1.0 for one in counts}
        returned = self._virtual.arrive(weights, now)
        passed = self._passed
        self._passed = {job.id: passed[job.id] for job in waiting if job.id in passed}
        turn = _Turn(capacity, tenants, self._virtual, returned, self._passed)
        due = waiting
        if capacity.only_short:
            due = [job for job in waiting if job.price.operations <= capacity.operations_of(job)]
        self._fill(turn, due)
        taken = Counter([job.tenant for job in turn.jobs])
        self._virtual.took_turn(taken, (counts - taken).keys())
        return turn.jobs

    def _fill(self, turn: _Turn, due: Sequence[JobRecord]) -> None:
        """Takes jobs into a batch."""
        classes = _classes(due, turn.capacity.most_jobs + _AHEAD)
        passed, interactive, batch = self._passed, classes["interactive"], classes["batch"]
        if interactive and batch and self._owed > 0:
            turn.add(batch, self._owed)
        turn.add(interactive or batch)
        if interactive and batch:
            own = sum(job.price.operations for job in turn.jobs if job.priority == "batch")
            most = _MOST_AHEAD * turn.capacity.operations
            self._owed = max(self._owed + BATCH_SHARE * turn.operations - own, -most)
        for line in (*interactive.values(), *batch.values()):
            for job in turn.passed_over(line):
                passed[job.id] = passed.get(job.id, 0) + 1
        for job in turn.jobs:
            passed.pop(job.id, None)


@dataclass(slots=True, eq=False)
class _Line:
    """The jobs of a tenant in a class, the oldest first.

    Attributes:
        tenant: the id of the tenant.
        jobs: the first of them.
        closed: how many jobs were taken when it was its turn, and none of these was; None if one
            was.
    """

    tenant: str
    jobs: list[JobRecord] = field(default_factory=list[JobRecord])
    closed: int | None = None


def _classes(waiting: Sequence[JobRecord], most: int) -> Mapping[Priority, Mapping[str, _Line]]:
    """Returns the jobs that are looked at, by class and tenant.

    Args:
        waiting: the jobs, the oldest first.
        most: how many of a tenant are looked at.
    """
    classes: dict[Priority, dict[str, _Line]] = {"interactive": {}, "batch": {}}
    for job in waiting:
        lines = classes[job.priority]
        line = lines.get(job.tenant)
        if line is None:
            line = lines[job.tenant] = _Line(job.tenant)
        if len(line.jobs) < most:
            line.jobs.append(job)
    return classes


class _Turn:
    """A batch that is being put together.

    Args:
        capacity: what the engine can take.
        tenants: the tenants, by id.
        virtual: what they have had.
        returned: those who have not waited before.
        passed: how many times jobs were passed over.

    Attributes:
        capacity: what the engine can take.
        jobs: the jobs that were taken.
        operations: what they take.
    """

    def __init__(
        self,
        capacity: Capacity,
        tenants: Mapping[str, Tenant],
        virtual: VirtualWork,
        returned: frozenset[str],
        passed: Mapping[str, int],
    ) -> None:
        self.capacity = capacity
        self._passed = passed
        self._tenants = tenants
        self._virtual = virtual
        self._returned = returned
        self._work = dict(virtual.all)  # as it would be if all that was taken is run
        self._taken: set[str] = set()
        self._bytes = 0.0
        self._most = capacity.most_jobs
        self.jobs: list[JobRecord] = []
        self.operations = 0.0

    def fits(self, job: JobRecord) -> bool:
        """Returns whether a job can be taken. The first always can."""
        if not self.jobs:
            return True
        first, price = self.jobs[0], job.price
        return (
            len(self.jobs) < min(self._most, job.company + 1)
            and price.joins == first.price.joins
            and self._joins(first)
            and self._joins(job)
            and self._bytes + price.peak_bytes <= self.capacity.budget
            and self.operations + price.operations <= self.capacity.operations_of(first)
        )

    def _joins(self, job: JobRecord) -> bool:
        """Whether a job may share passes with others at all."""
        tenant = self._tenants.get(job.tenant)
        struck = tenant is not None and tenant.strikes > 0
        return self.capacity.joins and bool(job.price.joins) and not struck

    def take(self, job: JobRecord) -> None:
        """Takes a job."""
        self.jobs.append(job)
        self._taken.add(job.id)
        self._bytes += job.price.peak_bytes
        self._most = min(self._most, job.company + 1)
        self.operations += job.price.operations
        self._work[job.tenant] += self._virtual.share_of(job.tenant, job.price.operations)

    def add(self, lines: Mapping[str, _Line], most: float | None = None) -> None:
        """Takes jobs of a class, of who has had the least first.

        Args:
            lines: the jobs, by tenant.
            most: how many operations are enough; None for as many as fit.
        """
        most = None if most is None else self.operations + most
        heap = [(self._rank(line), line.tenant) for line in lines.values()]
        heapq.heapify(heap)
        held: list[_Line] = []  # whose turn it is, and whose jobs go deeper, or not as deep
        while (heap or held) and not self._is_full(most):
            line = lines[heap[0][1]] if heap else None
            if line is not None and (not held or self._is_in_round(line, held[0])):
                heapq.heappop(heap)
                first = self._first(line)
                if first is None and self._is_overdue(line):
                    return  # nobody is taken instead of it
                job = self._like(line)
                if job is None:
                    line.closed = len(self.jobs)
                    if first is not None:
                        held.append(line)
                    continue
            else:
                line = held.pop(0)
                job = self._first(line)
                if job is None:
                    continue
            self.take(job)
            line.closed = None
            heapq.heappush(heap, (self._rank(line), line.tenant))

    def _is_in_round(self, line: _Line, first: _Line) -> bool:
        """Whether a tenant may go before another whose turn it is: if it is not far ahead of it."""
        ahead = self._virtual.share_of(line.tenant, self.jobs[0].price.operations)
        return self._work[line.tenant] <= self._work[first.tenant] + ahead

    def _rank(self, line: _Line) -> tuple[float, int, int]:
        """Where a tenant is among others. Of equals, who comes seldom goes first."""
        kind = 0 if self._is_overdue(line) else 1 if line.tenant in self._returned else 2
        return self._work[line.tenant], kind, line.jobs[0].sequence

    def _left(self, line: _Line) -> Iterator[JobRecord]:
        """The jobs of a tenant that may be next: none behind one that is overdue."""
        for job in line.jobs:
            if job.id not in self._taken:
                yield job
                if self._passed.get(job.id, 0) >= MOST_PASSED_OVER:
                    return

    def _first(self, line: _Line) -> JobRecord | None:
        """The first job of a tenant that can be taken, None if there is none."""
        return next((job for job in self._left(line) if self.fits(job)), None)

    def _like(self, line: _Line) -> JobRecord | None:
        """The first job of a tenant that can be taken and goes as deep as the batch."""
        for job in self._left(line):
            overdue = self._passed.get(job.id, 0) >= MOST_PASSED_OVER
            if (overdue or self._is_alike(job)) and self.fits(job):
                return job
        return None

    def _is_overdue(self, line: _Line) -> bool:
        """Whether a tenant has a job that was passed over as often as may be."""
        return any(self._passed.get(job.id, 0) >= MOST_PASSED_OVER for job in self._left(line))

    def _is_alike(self, job: JobRecord) -> bool:
        """Whether a job goes about as deep into the model as the first of the batch."""
        if not self.jobs:
            return True
        one, other = _depth(self.jobs[0]), _depth(job)
        return max(one, other) <= _ALIKE * min(one, other)

    def _is_full(self, most: float | None) -> bool:
        """Whether nothing more can be taken, or is to be."""
        if not self.jobs:
            return False
        if most is not None and self.operations >= most:
            return True
        return (
            len(self.jobs) >= self._most
            or self.operations >= self.capacity.operations_of(self.jobs[0])
            or self._bytes >= self.capacity.budget
            or not self._joins(self.jobs[0])
        )

    def passed_over(self, line: _Line) -> list[JobRecord]:
        """Returns the jobs of a tenant that were passed over for jobs that were due later."""
        there = [job.id in self._taken for job in line.jobs]
        last = max((at for at, taken in enumerate(there) if taken), default=0)
        found = [job for job, taken in zip(line.jobs[:last], there, strict=False) if not taken]
        if not found and line.closed is not None and line.closed < len(self.jobs):
            found = [job for job, taken in zip(line.jobs, there, strict=True) if not taken][:1]
        return found


def _depth(job: JobRecord) -> float:
    """How deep into the model a job goes, in operations a position."""
    return job.price.operations / max(1, job.price.positions)
