"""What a server remembers when its processes end: the interface of a store.

Every change of a job's state is a compare-and-set with an event in the same transaction, so a job
ends once, and who follows its events misses none and sees none twice. The clock is the store's.
`sqlite_store.py` is the one of a single machine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from insitu.remote.problems import Problem
from insitu.remote.protocol import JobEvent, JobState
from insitu.server.records import JobRecord, Key, Tenant


class Store(Protocol):
    """Tenants, keys, jobs, events, blobs and usage. Every method is one transaction."""

    def now(self) -> float:
        """Returns the store's time, in seconds since 1970."""
        ...

    def together(self, cheaply: bool = False) -> AbstractContextManager[object]:
        """Makes all that is changed in a `with` block one transaction, which takes less time.

        Nothing of it is kept if anything in it fails, also if that is suppressed in it.

        Args:
            cheaply: whether it need not survive a power failure.
        """
        ...

    # Tenants and keys.

    def put_tenant(self, tenant: Tenant) -> None:
        """Adds a tenant, or changes the one with its id."""
        ...

    def tenant(self, id: str) -> Tenant | None:
        """Returns a tenant."""
        ...

    def tenants(self) -> Sequence[Tenant]:
        """Returns all tenants."""
        ...

    def put_key(self, key: Key) -> None:
        """Adds a key, or changes the one with its prefix."""
        ...

    def key(self, prefix: str) -> Key | None:
        """Returns the key that begins so."""
        ...

    def keys(self) -> Sequence[Key]:
        """Returns all keys, the revoked ones too."""
        ...

    # Jobs.

    def add(self, job: JobRecord) -> JobRecord:
        """Takes a job in the state "queued", with its first event, and returns it as it is kept.

        A job of the same tenant with the same idempotency key is returned in its place, in any
        state.
        """
        ...

    def sent(self, tenant: str, idempotency: str) -> JobRecord | None:
        """Returns the job that a tenant has sent with an idempotency key; None without one."""
        ...

    def job(self, id: str) -> JobRecord | None:
        """Returns a job."""
        ...

    def jobs(
        self,
        tenant: str | None = None,
        states: Collection[JobState] = (),
        before: int | None = None,
        limit: int = 100,
    ) -> Sequence[JobRecord]:
        """Returns jobs, the newest first.

        Args:
            tenant: whose; None for everybody's.
            states: in which states; none for all.
            before: only those whose `sequence` is smaller.
            limit: how many at most.
        """
        ...

    def waiting(self, model: str) -> Sequence[JobRecord]:
        """Returns the queued jobs of a model, the oldest first."""
        ...

    def ahead(self, job: JobRecord) -> int:
        """Returns how many jobs of its model were queued before a job and still are."""
        ...

    def move(
        self,
        id: str,
        before: JobState,
        after: JobState,
        *,
        attempt: int | None = None,
        changes: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> JobRecord | None:
        """Takes a job from one state to another, and returns it; None if it was not there.

        `started` and `ended` are set as the states say, and an event "state" with `state`,
        `attempt` and `data` is added in the same transaction. A job that becomes "leased"
        begins another attempt, unless `changes` say which one. A job that goes back to "queued",
        or ends, loses its engine and its lease.

        Args:
            id: the job.
            before: the state that it has to be in.
            after: the state that follows.
            attempt: the attempt that it has to be in; None for any.
            changes: other fields of the record to set.
            data: more to say in the event.

        Raises:
            ValueError: if the one state may not follow the other.
        """
        ...

    def renew(self, engine: str, seconds: float) -> int:
        """Renews the leases of what an engine has, and returns how many there are."""
        ...

    def overdue(self) -> Sequence[JobRecord]:
        """Returns leased and running jobs whose lease has run out."""
        ...

    def give_back(
        self, engine: str, company: Mapping[str, int], problem: Problem
    ) -> Sequence[JobRecord]:
        """Takes back all that an engine had which has died, and returns it.

        A job goes back to "queued", to be run with as many others as `company` says of it. One
        that was begun as many times as a job may be fails with the problem.
        """
        ...

    def forget(self, moment: float) -> Sequence[JobRecord]:
        """Deletes the ended jobs that expire before a moment, with their events; returns them.

        A store may leave some of many for the next time.
        """
        ...

    # Events.

    def tell(
        self, id: str, kind: str, data: Mapping[str, Any], attempt: int | None = None
    ) -> JobEvent | None:
        """Adds an event to a job; None if there is no such job, or if it has ended.

        Args:
            id: the job.
            kind: what happened; as of `JobEvent`.
            data: what there is to say of it.
            attempt: the attempt that the job has to be in; None for any.
        """
        ...

    def events(self, id: str, after: int = 0, limit: int = 1000) -> Sequence[JobEvent]:
        """Returns the events of a job that come after one of them, in their order."""
        ...

    # Blobs.

    def grant(self, tenant: str, digest: str, size: int) -> None:
        """Says that a tenant has sent a tensor."""
        ...

    def has_blob(self, tenant: str, digest: str) -> bool:
        """Returns whether a tenant has sent a tensor, and marks it as used now."""
        ...

    def release(self, moment: float) -> Sequence[str]:
        """Forgets tensors that were last used before a moment, and returns the digests.

        Those that a job needs which has not ended stay, and those that another tenant still has
        are not among the digests.
        """
        ...

    def refers(self, digest: str) -> bool:
        """Returns whether a job, its results or a tenant's tensors still need a file."""
        ...

    def reserved(self) -> float:
        """Returns how many bytes the results of jobs may take that have not ended."""
        ...

    # Usage.

    def used(self, tenant: str, **amounts: float) -> None:
        """Adds to what a tenant has used today: `operations`, `seconds`, `received`, `sent`."""
        ...

    def usage(self, tenant: str) -> Mapping[str, float]:
        """Returns what a tenant has used today, and what it has now.

        That is `queued`, `running`, `stored` and `reserved`: what its results to come may take.
        """
        ...

    def strike(self, tenant: str) -> int:
        """Adds a strike to a tenant, and returns how many it has."""
        ...

    def close(self) -> None:
        """Closes the store."""
        ...
