"""What tests of the store share: jobs, clocks that can be moved, and stores that are closed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from insitu.remote.protocol import JobState
from insitu.server.records import JobRecord, Price
from insitu.server.storage.sqlite_store import SqliteStore
from insitu.server.storage.store_clock import StoreClock

DIGEST = "ab" * 32


def new_job(**fields: Any) -> JobRecord:
    """A job that nobody has had before."""
    given: dict[str, Any] = {
        "id": secrets.token_hex(16),
        "tenant": "ada",
        "model": "insitu/eiffel",
        "state": "queued",
        "priority": "interactive",
        "body": DIGEST,
        "price": Price(1, 1e9, 1e6, 1000),
    }
    return JobRecord(**{**given, **fields})


PATHS: dict[JobState, tuple[JobState, ...]] = {
    "queued": (),
    "leased": ("leased",),
    "running": ("leased", "running"),
    "done": ("leased", "running", "done"),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
    "expired": ("expired",),
}
"""A way to each state from the first."""


def job_in(store: SqliteStore, state: JobState, engine: str = "e1", **fields: Any) -> JobRecord:
    """A job that has been brought to a state."""
    job = store.add(new_job(**fields))
    for after in PATHS[state]:
        changes = {"engine": engine, "lease_until": store.now() + 30} if after == "leased" else {}
        moved = store.move(job.id, job.state, after, changes=changes)
        assert moved is not None
        job = moved
    return job


@dataclass
class Clocks:
    """The clock of a machine, which can be set, and one that only goes on."""

    wall: float = 1_800_000_000.0
    steady: float = 5_000.0

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def made(self) -> StoreClock:
        return StoreClock(lambda: self.wall, lambda: self.steady)
