"""A whole server without HTTP, with its engine and its admission workers, for tests of asyncio."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from insitu.server.core import Server
from insitu.server.records import Asked, JobRecord, Tenant
from insitu.server.settings import ServedModel, Settings
from insitu.server.states import has_ended
from insitu.server.storage.keys import KEY_FILE
from tests.server.samples import Sample

MODEL = "model"
_PATIENCE = 240.0


@asynccontextmanager
async def running(data: Path, model: Path, **settings: Any) -> AsyncIterator[Server]:
    """A server that runs for as long as the block lasts, and then ends as it should.

    Args:
        data: its data folder.
        model: the folder of its model, which it calls "model".
        settings: other fields of `Settings`.
    """
    server = Server(Settings([ServedModel(MODEL, str(model))], data, **settings))
    try:
        await server.start()
        yield server
    finally:
        await server.stop()


def user(server: Server) -> Tenant:
    """The user who runs the server."""
    return server.tenant_of((server.settings.data / KEY_FILE).read_text().strip())


async def sent(server: Server, sample: Sample, **asked: Any) -> JobRecord:
    """A job that the server has accepted."""
    return await server.submit(user(server), sample.body, Asked(**asked))


async def ended(server: Server, *jobs: JobRecord) -> list[JobRecord]:
    """Jobs as they are when all have ended."""
    found = [await server.ended(job.id, _PATIENCE) for job in jobs]
    assert all(has_ended(job.state) for job in found), found
    return found


async def until(holds: Callable[[], object]) -> None:
    """Waits until something holds."""
    async with asyncio.timeout(_PATIENCE):
        while not holds():
            await asyncio.sleep(0.01)


async def is_ready(server: Server) -> int:
    """Waits until the engine is ready, and returns the number of its process."""
    host = server.hosts[MODEL]
    await until(lambda: host.state == "ready")
    assert host.ready is not None
    return host.ready.pid


@asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    """A process that does nothing for as long as the block lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was ended
            os.kill(pid, signal.SIGCONT)


def begun(server: Server, job: JobRecord) -> int:
    """How many times a job was begun."""
    events = server.store.events(job.id)
    return sum(one.data.get("state") == "running" for one in events)
