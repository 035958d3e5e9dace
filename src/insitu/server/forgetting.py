"""Deleting what nobody may ask for any more: jobs that ended long ago, and files without a job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from insitu.server.metrics import Metrics
from insitu.server.storage.files import Files
from insitu.server.storage.store import Store

_SECONDS = 60.0
_SWEEPS = 60
"""All files are looked at every so many times: there may be hundreds of thousands."""


async def forget_now_and_then(
    store: Store,
    files: Files,
    metrics: Metrics,
    stored_seconds: float,
    changed: Callable[[str], None],
) -> None:
    """Deletes old jobs and files, again and again.

    Args:
        store: as of `forget`.
        files: as of `forget`.
        metrics: takes how much there is.
        stored_seconds: as of `forget`.
        changed: as of `forget`.
    """
    number = 0
    while True:
        await asyncio.sleep(_SECONDS)
        await forget(store, files, stored_seconds, changed)
        if number % _SWEEPS == 0:
            await files.sweep_in_turns(store.refers)
            for what, size in (await asyncio.to_thread(files.sizes)).items():
                metrics.stored(what, size)
        number += 1


async def forget(
    store: Store, files: Files, stored_seconds: float, changed: Callable[[str], None]
) -> None:
    """Deletes the jobs whose time is over, tensors that nothing has used, and their files.

    Args:
        store: what the server remembers.
        files: where bytes are.
        stored_seconds: after how long tensors go that nothing has used.
        changed: called with the id of each job that is gone.
    """
    while gone := store.forget(store.now()):
        for job in gone:
            changed(job.id)
        bodies = [files.body_path(job.body) for job in gone]
        results = [files.result_path(job.result) for job in gone if job.result]
        files.remove_unneeded([*bodies, *results], store.refers)
        await asyncio.sleep(0)  # others have their turn
    released = store.release(store.now() - stored_seconds)
    files.remove_unneeded(map(files.blob_path, released), store.refers)
