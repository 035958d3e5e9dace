"""The jobs that an engine has, and what the store is told of them. Nothing here waits.

A disk that is full stops no engine and no server. The state of a job is written as soon as there is
room. News that are only good to know on the way, such as its progress, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from insitu.remote.problems import Problem
from insitu.remote.protocol import JobEvent, JobState
from insitu.server.engines.messages import Ended, Told
from insitu.server.engines.sent_batches import Running
from insitu.server.engines.waiting_jobs import WaitingJobs
from insitu.server.metrics import Metrics
from insitu.server.records import JobRecord
from insitu.server.states import MOST_ATTEMPTS
from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.files import Files
from insitu.server.storage.store import Store
from insitu.server.storage.unwritten import Unwritten

LEASE_SECONDS = 30.0

DIED = Problem(
    "engine_died",
    "Engine died",
    500,
    "The process that ran the job has ended over it, each time that it was begun: it takes more "
    "memory than there is, or does not come to an end.",
)
_LOST = Problem("storage", "Results lost", 507, "The results of the job were deleted by somebody.")
_HELD = ("leased", "running")
_ONCE = ("token", "value")
"""The kinds of events that are told once each, even if passes run again."""


class HeldJobs:
    """The batches that the engine of a model has.

    Args:
        store: what the server remembers.
        files: where results are.
        waiting: the jobs of the model that wait.
        metrics: counts what happens.
        model: the id of the model.
        stored_seconds: how long results are kept.
        changed: called with the id of a job to which something has happened.

    Attributes:
        batches: the batches by number.
        unwritten: what the store had no room for.
    """

    def __init__(
        self,
        store: Store,
        files: Files,
        waiting: WaitingJobs,
        metrics: Metrics,
        model: str,
        stored_seconds: float,
        changed: Callable[[str], None],
    ) -> None:
        self._store, self._files, self._waiting = store, files, waiting
        self._metrics, self._model = metrics, model
        self._stored_seconds, self._changed = stored_seconds, changed
        self._numbers = 0
        self.batches: dict[int, Running] = {}
        self.unwritten = Unwritten()
        self._told_before: dict[str, set[tuple[object, ...]]] = {}
        self._struck: set[str] = set()  # the jobs for which their tenant has a strike

    def lease(
        self, picked: Sequence[JobRecord], engine: str, in_pieces: bool
    ) -> tuple[int, list[JobRecord]]:
        """Takes jobs out of the queue for an engine.

        Args:
            picked: the jobs.
            engine: the engine.
            in_pieces: whether others get their turn between pieces of the batch.

        Returns:
            The number of the batch, and the jobs as they are in it: none if nobody waits for one
            of them any more, or if the store has no room.
        """
        lease = {"engine": engine, "lease_until": self._store.now() + LEASE_SECONDS}
        try:
            with self._store.together():
                moved = [
                    self._store.move(job.id, "queued", "leased", changes=lease) for job in picked
                ]
        except StorageError:  # they wait on
            return self._numbers, []
        leased = [job for job in moved if job is not None]
        for job in leased:
            self._metrics.in_state("queued", self._store.now() - job.created)
            self._changed(job.id)
        self._waiting.remove([job.id for job in picked])
        if leased:
            self._numbers += 1
            batch = Running({job.id: job for job in leased}, leased, in_pieces)
            self.batches[self._numbers] = batch
            self._metrics.batch(self._model, len(leased))
        return self._numbers, leased

    def running(self) -> Counter[str]:
        """Returns how many jobs of each tenant the engine has."""
        batches = self.batches.values()
        return Counter([job.tenant for batch in batches for job in batch.jobs.values()])

    def left(self) -> list[JobRecord]:
        """Returns the jobs that the engine has, and has not ended."""
        return [job for batch in self.batches.values() for job in batch.jobs.values()]

    def began(self, number: int) -> None:
        """Takes that an engine has begun a batch.

        Args:
            number: its number.
        """
        batch = self.batches.get(number)
        if batch is not None:
            batch.began = True
            begun = [(job.id, job.attempt) for job in batch.jobs.values()]
            self.unwritten.write(partial(self._write_begun, begun))

    def happened(self, found: Sequence[Told | Ended]) -> None:
        """Takes what has happened to jobs. News of another attempt count for nothing.

        Args:
            found: what happens to them while they run, and their ends.
        """
        self._told([one for one in found if isinstance(one, Told)])
        ends: list[Ended] = []
        for one in found:
            if isinstance(one, Ended):
                batch = self._batch_of(one.id, one.attempt)
                if batch is not None:
                    del batch.jobs[one.id]
                    self._told_before.pop(one.id, None)
                    ends.append(one)
        if ends:
            self.unwritten.write(partial(self._write_ends, ends))

    def _told(self, told: Sequence[Told]) -> None:
        told = [one for one in told if self._batch_of(one.id, one.attempt) is not None]
        told = [one for one in told if one.attempt == 1 or not self._was_told(one)]
        if told and not self.unwritten:
            with suppress(StorageError):
                with self._store.together(cheaply=True):
                    for one in told:
                        self._store.tell(one.id, one.kind, one.data, one.attempt)
                for id in dict.fromkeys(one.id for one in told):
                    self._changed(id)

    def _was_told(self, told: Told) -> bool:
        """Whether an earlier attempt has told of a token or of a value."""
        before = self._told_before.get(told.id)
        if before is None:  # nothing of this attempt is among the events
            before = self._told_before[told.id] = self._places_told(told.id)
        return _place(told) in before

    def _places_told(self, id: str) -> set[tuple[object, ...]]:
        """What the events of a job tell of that is told once."""
        places, after = set[tuple[object, ...]](), 0
        while found := self._store.events(id, after):
            places |= {_place(one) for one in found if one.kind in _ONCE}
            after = found[-1].number
        return places

    def batch_ended(self, number: int, seconds: float, passes: int) -> Running:
        """Takes the end of a batch, and returns it.

        Args:
            number: its number.
            seconds: how long it took.
            passes: how many passes of the model it took.

        Raises:
            ValueError: if the engine has not said what has become of all of its jobs.
        """
        batch = self.batches[number]
        if batch.jobs:
            raise ValueError(f"{len(batch.jobs)} jobs of a batch have no end")
        del self.batches[number]
        self.unwritten.write(partial(self._write_seconds, batch.tenants, seconds))
        prices = [job.price for job in batch.all]
        operations = sum(price.operations for price in prices)
        invocations = sum(price.invocations for price in prices)
        self._metrics.batch_ended(self._model, seconds, passes, operations, invocations)
        return batch

    def take_back(self, engine: str, counts: bool = True, hung: bool = False) -> None:
        """Queues again what an engine had, which has ended.

        Args:
            engine: the engine.
            counts: whether what had begun was begun once more: no job is begun for ever.
            hung: whether the engine was ended because it did not come on.
        """
        batches, self.batches = self.batches, {}
        self._told_before.clear()
        company: dict[str, int] = {}
        spared: list[JobRecord] = []
        for batch in batches.values():
            waits = batch.in_pieces and len(batches) > 1  # another ran between its pieces
            if batch.began and counts and not waits:
                self._strike(batch.all, hung)
            for job in batch.jobs.values():
                if not (batch.began and counts):
                    spared.append(job)
                    continue
                # The third time it is alone, so that no neighbour's fault makes it fail.
                company[job.id] = max(0, len(batch.all) // 8 - 1) if job.attempt == 1 else 0
        self.unwritten.write(partial(self._write_back, engine, company, spared))

    def take_overdue(self, engine: str) -> None:
        """Queues again what an earlier engine has left, if that could not be written at its end.

        Args:
            engine: the one that there is now.
        """
        if self.unwritten:
            return
        engines = {job.engine for job in self._store.overdue() if job.model == self._model}
        for one in engines - {engine}:
            self.unwritten.write(partial(self._write_back, one, {}, []))

    def fail(self, jobs: Sequence[JobRecord], problem: Problem) -> None:
        """Fails jobs that wait, and cannot be run any more.

        Args:
            jobs: the jobs.
            problem: why not.
        """
        self._waiting.remove([job.id for job in jobs])
        for job in jobs:
            self.unwritten.write(partial(self._write_failed, job.id, problem))

    def _strike(self, jobs: Sequence[JobRecord], hung: bool) -> None:
        """Notes whose job has ended an engine, also if it was cancelled meanwhile. Once for each.

        An engine that dies may have been ended by somebody else, so that counts the last time. One
        that hangs over a job does so because of it.
        """
        job = jobs[0]
        if len(jobs) == 1 and (hung or job.attempt >= MOST_ATTEMPTS) and job.id not in self._struck:
            self._struck.add(job.id)
            self.unwritten.write(partial(self._store.strike, job.tenant))

    def _batch_of(self, id: str, attempt: int) -> Running | None:
        """The batch that has a job in an attempt."""
        for batch in self.batches.values():
            job = batch.jobs.get(id)
            if job is not None and job.attempt == attempt:
                return batch
        return None

    def _held(self, id: str, attempt: int) -> JobRecord | None:
        """A job as it is in the store, None if it is not in this attempt any more."""
        job = self._store.job(id)
        return job if job and job.state in _HELD and job.attempt == attempt else None

    def _write_begun(self, begun: Sequence[tuple[str, int]]) -> None:
        with self._store.together():
            moved = [self._begin(id, attempt) for id, attempt in begun]
        for job in moved:
            if job is not None:
                self._changed(job.id)

    def _begin(self, id: str, attempt: int) -> JobRecord | None:
        return self._store.move(id, "leased", "running", attempt=attempt)

    def _write_seconds(self, tenants: Collection[str], seconds: float) -> None:
        with self._store.together(cheaply=True):
            for tenant in tenants:
                self._store.used(tenant, seconds=seconds / len(tenants))

    def _write_failed(self, id: str, problem: Problem) -> None:
        if self._store.move(id, "queued", "failed", changes={"problem": problem}) is not None:
            self._metrics.ended(self._model, "failed")
            self._changed(id)

    def _write_ends(self, ends: Sequence[Ended]) -> None:
        """Writes what has become of jobs, unless somebody has cancelled them meanwhile."""
        with self._store.together():
            now = [self._end(ended) for ended in ends]
        for job in now:
            if job is None:
                continue
            if job.state == "queued":
                self._wait_again(job)
                continue
            self._metrics.ended(self._model, job.state)
            seconds = (job.ended or 0.0) - (job.started or job.ended or 0.0)
            self._metrics.in_state("running", seconds)
            self._changed(job.id)

    def _end(self, ended: Ended) -> JobRecord | None:
        """Writes what has become of a job, and returns it if it is not somebody else's by now."""
        job = self._held(ended.id, ended.attempt)
        if job is None:
            return None
        after, changes = self._end_of(ended)
        if job.state == "leased":  # an engine ends nothing that it has not begun
            self._begin(ended.id, ended.attempt)
        # In the same turn as `move`, so that nothing deletes the file between.
        if after == "done" and not self._files.result_path(ended.digest).exists():
            if job.attempt < MOST_ATTEMPTS:
                return self._store.move(ended.id, "running", "queued")
            after, changes = "failed", {"problem": _LOST}
        changes = {**changes, "expires": self._store.now() + self._stored_seconds}
        return self._store.move(ended.id, "running", after, attempt=ended.attempt, changes=changes)

    def _end_of(self, ended: Ended) -> tuple[JobState, Mapping[str, Any]]:
        if ended.cancelled:
            return "cancelled", {}
        if ended.problem is not None:
            late = ended.problem.code == "late"
            return "expired" if late else "failed", {"problem": ended.problem}
        return "done", {"result": ended.digest, "result_bytes": ended.bytes}

    def _write_back(
        self,
        engine: str,
        company: Mapping[str, int],
        spared: Sequence[JobRecord],
    ) -> None:
        for job in spared:
            held = self._held(job.id, job.attempt)
            if held is not None:
                before = {"attempt": job.attempt - 1}
                self._wait_again(self._store.move(job.id, held.state, "queued", changes=before))
        for job in self._store.give_back(engine, company, DIED):
            if job.state == "queued":
                self._wait_again(job)
                continue
            self._metrics.ended(self._model, job.state)
            self._changed(job.id)

    def _wait_again(self, job: JobRecord | None) -> None:
        if job is not None:
            self._waiting.add(job)
            self._changed(job.id)


def _place(event: Told | JobEvent) -> tuple[object, ...]:
    """What tells a token or a value of a job from others."""
    names = ("block", "invocation", "name", "step")
    return (event.kind, *(event.data.get(name) for name in names))
