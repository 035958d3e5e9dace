"""The jobs of a model that wait, in memory: what the store says of them, without asking it."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from insitu.server.limits import TenantLimits, may_run
from insitu.server.records import JobRecord

_MOST_LENGTHS = 1_000


class WaitingJobs:
    """Jobs in the order in which they were accepted, also those that wait again.

    Args:
        jobs: those that wait at first.
    """

    def __init__(self, jobs: Iterable[JobRecord]) -> None:
        self._jobs: list[JobRecord] = sorted(jobs, key=_sequence)
        self._ids = {job.id for job in self._jobs}
        self.operations = sum(job.price.operations for job in self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: JobRecord) -> bool:
        return job.id in self._ids

    def in_order(self) -> Sequence[JobRecord]:
        """Returns them, the oldest first."""
        return self._jobs

    def due(self, running: Counter[str], limits: Mapping[str, TenantLimits]) -> Sequence[JobRecord]:
        """Returns those that may begin to run now, the oldest first.

        Args:
            running: how many jobs of each tenant run.
            limits: what tenants may take.
        """
        if all(one.running_jobs is None for one in limits.values()):
            return self._jobs
        running, found = Counter(running), list[JobRecord]()
        for job in self._jobs:
            limit = limits.get(job.tenant)
            if limit is None or may_run(limit, running[job.tenant]):
                running[job.tenant] += 1
                found.append(job)
        return found

    def add(self, job: JobRecord) -> None:
        """Adds a job that is queued.

        Args:
            job: the job.
        """
        if job.id not in self._ids:
            self._ids.add(job.id)
            insort(self._jobs, job, key=_sequence)
            self.operations += job.price.operations

    def remove(self, ids: Iterable[str]) -> None:
        """Takes out jobs that wait no longer.

        Args:
            ids: the jobs. One that is not there is left out.
        """
        gone = self._ids.intersection(ids)
        if gone:
            self._ids -= gone
            self._jobs = [job for job in self._jobs if job.id not in gone]
            self.operations = sum(job.price.operations for job in self._jobs)


class KnownLengths:
    """The lengths of prompts that jobs had lately: what each takes is known in a moment."""

    def __init__(self) -> None:
        self._lengths: dict[int, None] = {}

    def new(self, lengths: Sequence[int]) -> list[int]:
        """Returns those of some lengths that are not known.

        Args:
            lengths: the lengths.
        """
        return [length for length in lengths if length not in self._lengths]

    def know(self, lengths: Sequence[int]) -> None:
        """Remembers lengths, the latest of them.

        Args:
            lengths: the lengths.
        """
        self._lengths |= dict.fromkeys(lengths)
        while len(self._lengths) > _MOST_LENGTHS:
            del self._lengths[next(iter(self._lengths))]


def _sequence(job: JobRecord) -> int:
    return job.sequence
