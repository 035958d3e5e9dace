"""A server in memory, without models: what the HTTP front stands on in its tests."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from insitu.remote.problems import Problem, ProblemError
from insitu.remote.protocol import (
    JobEvent,
    JobList,
    JobPlan,
    JobState,
    JobStatus,
    ModelList,
    ModelStatus,
    SavedShape,
    Usage,
)
from insitu.server.core import Asked
from insitu.server.records import JobRecord, Price, Tenant
from insitu.server.settings import Settings
from insitu.server.states import has_ended

ADA, BOB = "insitu_adaadaad_secret", "insitu_bobbobbo_secret"
ADMIN = "insitu_adminadm_secret"
TENANTS = {ADA: Tenant("a", "Ada"), BOB: Tenant("b", "Bob"), ADMIN: Tenant("c", "Admin")}
SCOPES = {ADA: {"jobs"}, BOB: {"jobs"}, ADMIN: {"jobs", "admin"}}
PRICE = Price(1, 1e9, 1e6, 100)
RESULTS = bytes(range(256)) * 4
DIGEST = "d" * 64
SKELETON = b"a skeleton"


class FakeServed:
    """A server in memory. Its jobs end when a test says so.

    Attributes:
        settings: as of `Served`.
        submitted: whose jobs were submitted, their bytes, and what was asked for.
        blobs: the tensors of each tenant.
        raised: what the next call of `submit` or `plan` raises.
        told: the events of each job.
        followed: how many streams of events are being made.
    """

    def __init__(self, folder: Path, **settings: object) -> None:
        self.settings = replace(Settings((), folder), **settings)  # pyright: ignore[reportArgumentType]
        self.submitted: list[tuple[str, bytes, Asked]] = []
        self.blobs = defaultdict[str, dict[str, int]](dict)
        self.raised: BaseException | None = None
        self.told = defaultdict[str, list[JobEvent]](list)
        self.states: dict[str, str] = {"insitu/eiffel": "ready"}
        self.followed = 0
        self._jobs: dict[str, JobRecord] = {}
        self._news = asyncio.Condition()

    def tenant_of(self, key: str, scope: str = "jobs") -> Tenant:
        if key not in TENANTS:
            raise ProblemError(Problem("unauthorised", "No key", 401, "Not let in."))
        if scope not in SCOPES[key]:
            raise ProblemError(Problem("scope", "Not allowed", 403, "Not good for that."))
        return TENANTS[key]

    async def submit(self, tenant: Tenant, body: bytes, asked: Asked) -> JobRecord:
        if self.raised is not None:
            raise self.raised
        self.submitted.append((tenant.id, body, asked))
        return self.add(tenant.id, asked)

    async def plan(self, tenant: Tenant, body: bytes, asked: Asked) -> JobPlan:
        if self.raised is not None:
            raise self.raised
        shape = SavedShape("logits", "(1, 9)", "float32", 36)
        return JobPlan("insitu/eiffel", 1, 1e9, 1e6, len(body), [shape])

    def job(self, tenant: Tenant, id: str) -> JobRecord:
        found = self._jobs.get(id)
        if found is None or found.tenant != tenant.id:
            raise ProblemError(Problem("not_found", "Not found", 404, "There is no such job."))
        return found

    def jobs(self, tenant: Tenant, states: Collection[JobState], after: str, limit: int) -> JobList:
        found = [
            job
            for job in reversed(self._jobs.values())
            if job.tenant == tenant.id
            and (not states or job.state in states)
            and (not after or job.sequence < int(after))
        ]
        more = str(found[limit - 1].sequence) if len(found) > limit else None
        return JobList([self.status(job) for job in found[:limit]], more)

    def status(self, record: JobRecord) -> JobStatus:
        return JobStatus(record.id, record.state, record.model, problem=record.problem)

    async def cancel(self, tenant: Tenant, id: str) -> JobRecord:
        record = self.job(tenant, id)
        return record if has_ended(record.state) else await self.move(id, "cancelled")

    async def ended(self, id: str, seconds: float) -> JobRecord:
        try:
            async with asyncio.timeout(seconds), self._news:
                await self._news.wait_for(lambda: has_ended(self._jobs[id].state))
        except TimeoutError:
            pass
        return self._jobs[id]

    async def events(self, id: str, after: int) -> AsyncIterator[JobEvent]:
        self.followed += 1
        try:
            while True:
                for event in self.told[id][after:]:
                    yield event
                    after = event.number
                async with self._news:
                    if after >= len(self.told[id]):
                        if has_ended(self._jobs[id].state):
                            return
                        await self._news.wait()
        finally:
            self.followed -= 1

    def result_path(self, record: JobRecord) -> Path:
        return self.settings.data / record.result

    def check_blob(self, tenant: Tenant, size: int) -> None:
        if self.raised is not None:
            raise self.raised

    async def put_blob(self, tenant: Tenant, digest: str, body: bytes | memoryview) -> None:
        if self.raised is not None:
            raise self.raised
        self.blobs[tenant.id][digest] = len(body)

    def has_blob(self, tenant: Tenant, digest: str) -> bool:
        return digest in self.blobs[tenant.id]

    def models(self) -> ModelList:
        status = ModelStatus("insitu/eiffel", "GPT2LMHeadModel", "float32", "ready", DIGEST)
        return ModelList([status], "0.1.0")

    def skeleton(self, id: str) -> tuple[bytes, str]:
        if id != "insitu/eiffel":
            raise ProblemError(Problem("unknown_model", "Unknown", 404, "There is no such model."))
        return SKELETON, DIGEST

    def usage(self, tenant: Tenant) -> Usage:
        return Usage(1.0, 2.0, 3, 4, 5, 6)

    def ready(self) -> Mapping[str, str]:
        return self.states

    def metrics(self) -> str:
        return "insitu_jobs_accepted_total 3\n"

    # What tests say.

    def add(self, tenant: str = "a", asked: Asked | None = None) -> JobRecord:
        """Adds a job that waits."""
        number = len(self._jobs) + 1
        asked = asked or Asked()
        record = JobRecord(
            f"{number:032x}", tenant, "insitu/eiffel", "queued", asked.priority, "b" * 64, PRICE,
            sequence=number,
        )  # fmt: skip
        self._jobs[record.id] = record
        return record

    async def tell(self, id: str, kind: str, **data: object) -> None:
        """Adds an event."""
        number = len(self.told[id]) + 1
        self.told[id].append(JobEvent(number, kind, data))  # pyright: ignore[reportArgumentType]
        async with self._news:
            self._news.notify_all()

    async def move(
        self, id: str, state: JobState, problem: Problem | None = None, data: bytes = RESULTS
    ) -> JobRecord:
        """Moves a job to another state, with its event."""
        changes: dict[str, object] = {"state": state, "problem": problem}
        if state == "done":
            changes |= {"result": DIGEST, "result_bytes": len(data)}
            (self.settings.data / DIGEST).write_bytes(data)
        self._jobs[id] = replace(self._jobs[id], **changes)  # pyright: ignore[reportArgumentType]
        await self.tell(id, "state", state=state, attempt=1)
        return self._jobs[id]
