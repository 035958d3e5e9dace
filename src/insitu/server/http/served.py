"""What the HTTP front needs of a server: the interface between HTTP and everything else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Protocol

from insitu.remote.protocol import JobEvent, JobList, JobPlan, JobState, JobStatus, ModelList, Usage
from insitu.server.records import Asked, JobRecord, Tenant
from insitu.server.settings import Settings


class Served(Protocol):
    """A server without HTTP. A request that cannot be answered raises a `ProblemError`."""

    @property
    def settings(self) -> Settings:
        """What the server was told when it started."""
        ...

    def tenant_of(self, key: str, scope: str = "jobs") -> Tenant:
        """Returns whose key it is.

        Raises:
            ProblemError: 401 for a key that is none, 403 for one without the scope.
        """
        ...

    async def submit(self, tenant: Tenant, body: bytes, asked: Asked) -> JobRecord:
        """Accepts a job, and returns it once it cannot be lost."""
        ...

    async def plan(self, tenant: Tenant, body: bytes, asked: Asked) -> JobPlan:
        """Returns what a job would take, and runs nothing."""
        ...

    def job(self, tenant: Tenant, id: str) -> JobRecord:
        """Returns a job of a tenant.

        Raises:
            ProblemError: 404 for an id of no job, and for a job of another tenant.
        """
        ...

    def jobs(self, tenant: Tenant, states: Collection[JobState], after: str, limit: int) -> JobList:
        """Returns a page of a tenant's jobs, the newest first.

        Args:
            tenant: whose.
            states: in which states; none for all.
            after: what the page before has said, "" for the first page.
            limit: how many at most.
        """
        ...

    def status(self, record: JobRecord) -> JobStatus:
        """Returns the status of a job, as its client is told."""
        ...

    async def cancel(self, tenant: Tenant, id: str) -> JobRecord:
        """Cancels a job that has not ended, and returns it."""
        ...

    async def ended(self, id: str, seconds: float) -> JobRecord:
        """Waits until a job has ended, and at most some seconds, and returns it."""
        ...

    def events(self, id: str, after: int) -> AsyncIterator[JobEvent]:
        """Gives the events of a job behind one of them, and ends behind the one that is its end.

        The next one is made when it is asked for: what nobody takes, takes no memory.
        """
        ...

    def result_path(self, record: JobRecord) -> Path:
        """Returns the file with the results of a job that is done."""
        ...

    def check_blob(self, tenant: Tenant, size: int) -> None:
        """Raises if a tenant may not send a tensor of a size now: before it is sent."""
        ...

    async def put_blob(self, tenant: Tenant, digest: str, body: bytes | memoryview) -> None:
        """Keeps a tensor, once it was seen to have that digest.

        A large one comes as a view of a file, which takes no memory, and which is gone when this
        returns.
        """
        ...

    def has_blob(self, tenant: Tenant, digest: str) -> bool:
        """Returns whether a tenant has sent a tensor."""
        ...

    def models(self) -> ModelList:
        """Returns the models that are served."""
        ...

    def skeleton(self, id: str) -> tuple[bytes, str]:
        """Returns the skeleton of a model, and its digest."""
        ...

    def usage(self, tenant: Tenant) -> Usage:
        """Returns what a tenant has used, and what it may."""
        ...

    def ready(self) -> Mapping[str, str]:
        """Returns the state of each model by its id: "ready" for one that runs jobs."""
        ...

    def metrics(self) -> str:
        """Returns the measurements, in the text format of Prometheus."""
        ...
