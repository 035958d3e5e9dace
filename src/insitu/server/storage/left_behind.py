"""What an earlier server has left behind: jobs that engines had, and jobs for other models."""

from __future__ import annotations

from collections.abc import Collection

from insitu.server.engines.held_jobs import DIED
from insitu.server.engines.known_weights import CHANGED
from insitu.server.storage.store import Store

_ALL = 1_000_000


def take_over(store: Store, models: Collection[str]) -> None:
    """Queues again what engines had when the server ended, and fails what can never be run.

    Args:
        store: what the server before remembered.
        models: the ids of the models that there are now.
    """
    for job in store.jobs(states=("leased",), limit=_ALL):  # it had not begun
        store.move(job.id, "leased", "queued", changes={"attempt": job.attempt - 1})
    # It may be the reason why the whole machine went down, so that counts.
    for engine in {job.engine for job in store.jobs(states=("running",), limit=_ALL)}:
        store.give_back(engine, {}, DIED)
    for job in store.jobs(states=("queued",), limit=_ALL):
        if job.model not in models:
            store.move(job.id, "queued", "failed", changes={"problem": CHANGED})
