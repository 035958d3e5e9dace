"""Deleting what nobody may ask for any more: jobs that ended long ago, and files without a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from insitu.server.metrics import Metrics
from insitu.server.storage.files import Files
from insitu.server.storage.store import Store

_SECONDS = 60.0


async def forget_now_and_then(
    store: Store,
    files: Files,
    metrics: Metrics,
    stored_seconds: float,
    changed: Callable[[str], None],
) -> None:
    """Deletes what is old, again and again.

    Args:
        store: what the server remembers.
        files: where bytes are.
        metrics: takes how much there is.
        stored_seconds: after how long tensors go that nothing has used.
        changed: called with the id of each job that is gone.
    """
    while True:
        await asyncio.sleep(_SECONDS)
        while gone := store.forget(store.now()):
            for job in gone:
                changed(job.id)
            await asyncio.sleep(0)  # others have their turn
        store.release(store.now() - stored_seconds)
        await files.sweep_in_turns(store.refers)
        for what, size in (await asyncio.to_thread(files.sizes)).items():
            metrics.stored(what, size)
