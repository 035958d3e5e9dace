"""Running a block in another thread, so that an event loop goes on: `async with`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from insitu.graph.cells import Missing
from insitu.graph.recording import Recording
from insitu.graph.saved_proxy import withdraw


async def run_in_thread(run: Callable[[], None], recording: Recording) -> None:
    """Runs a block in another thread.

    A run that has begun is not broken off: if the task is cancelled, that takes effect when the
    model has run, and nothing is saved.

    Args:
        run: runs it.
        recording: what was recorded, with what is to be saved.
    """
    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        saves = dict(recording.saves)
        with contextlib.suppress(BaseException):
            await running
        missing = Missing("its task was cancelled.")
        for index, holder in saves.items():
            withdraw(holder, recording, index, missing)
        raise
