import asyncio
import os
import signal
from pathlib import Path

import pytest

from insitu.remote.problems import ProblemError
from insitu.server import core
from insitu.server.core import Server
from insitu.server.engines import admission_pool, hosting
from insitu.server.records import JobRecord
from tests.server.samples import Sample, agrees
from tests.server.whole_server import (
    MODEL,
    begun,
    ended,
    is_ready,
    running,
    sent,
    stopped,
    until,
    user,
)


@pytest.mark.thorough
def test_an_engine_that_hangs_is_ended_and_its_jobs_run_again(
    tmp_path: Path, model: Path, jobs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "SILENT_SECONDS", 3.0)

    async def main() -> None:
        async with running(tmp_path, model) as server:
            engine = await is_ready(server)
            found = [await sent(server, one) for one in jobs * 2]
            await until(lambda: begun(server, found[0]))
            os.kill(engine, signal.SIGSTOP)
            for job, one in zip(await ended(server, *found), jobs * 2, strict=True):
                assert job.state == "done" and job.attempt <= 2
                assert agrees(server.result_path(job).read_bytes(), one)
            assert await is_ready(server) != engine
            assert max(begun(server, job) for job in found) == 2

    asyncio.run(main())


@pytest.mark.slow
def test_what_checks_jobs_may_hang_and_clients_may_vanish(
    tmp_path: Path, model: Path, jobs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(admission_pool, "_FORK_SECONDS", 1.0)

    async def main() -> None:
        async with running(tmp_path, model, admission_seconds=2.0) as server:
            engine = await is_ready(server)
            await vanish(server, engine, jobs)
            await hang(server, jobs[0])

    asyncio.run(main())


async def vanish(server: Server, engine: int, jobs: list[Sample]) -> None:
    """A job ends without its client if that has said that it waits, and not else."""
    async with stopped(engine):
        alone = await sent(server, jobs[0], attended=True)
        followed = await sent(server, jobs[1], attended=True)
        later = await sent(server, jobs[2])
        follower = asyncio.create_task(server.ended(followed.id, 240))
        await until(lambda: state(server, alone) == "cancelled")
        assert {state(server, followed), state(server, later)} <= {"queued", "leased"}
    assert (await follower).state == "done"
    assert [job.state for job in await ended(server, alone, later)] == ["cancelled", "done"]


def state(server: Server, job: JobRecord) -> str:
    found = server.store.job(job.id)
    assert found is not None
    return found.state


async def hang(server: Server, job: Sample) -> None:
    """Workers and the process that they are forked from are ended if they do not answer."""
    pool = server.hosts[MODEL].admission
    (worker,) = pool.workers
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(ProblemError, match="could not be found out"):
        await sent(server, job)
    assert pool.template is not None
    os.kill(pool.template, signal.SIGSTOP)
    (done,) = await ended(server, await sent(server, job))
    assert done.state == "done"


@pytest.mark.slow
def test_a_job_whose_engine_hangs_each_time_fails_and_counts_against_its_tenant(
    tmp_path: Path, model: Path, jobs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "SILENT_SECONDS", 3.0)
    sweep = jobs[3]

    async def main() -> None:
        async with running(tmp_path, model) as server:
            job = await sent(server, sweep)
            for attempt in (1, 2, 3):
                engine = await is_ready(server)
                await until(lambda attempt=attempt: begun(server, job) == attempt)
                os.kill(engine, signal.SIGSTOP)
                await until(lambda: server.hosts[MODEL].state != "ready")
            (found,) = await ended(server, job)
            assert (found.state, found.attempt) == ("failed", 3)
            assert found.problem is not None and found.problem.code == "engine_died"
            assert user(server).strikes == 1
            (done,) = await ended(server, await sent(server, jobs[0]))
            assert done.state == "done"

    asyncio.run(main())
