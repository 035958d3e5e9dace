import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from insitu.graph.errors import OptionError
from insitu.remote.problems import ProblemError
from insitu.server.core import Server
from insitu.server.records import JobRecord
from insitu.server.settings import ServedModel, Settings
from insitu.server.storage.sqlite_store import SqliteStore
from tests.fidelity.zoo import module_of
from tests.server.samples import agrees, samples, small_model
from tests.server.whole_server import MODEL, begun, ended, is_ready, running, sent, until

FAILED = ("failed", "model_changed")


@contextmanager
def store(data: Path) -> Iterator[SqliteStore]:
    """What the server has remembered when it has ended."""
    found = SqliteStore(data / "server.db")
    yield found
    found.close()


def end(job: JobRecord) -> tuple[str, str]:
    return job.state, job.problem.code if job.problem else ""


@pytest.mark.thorough
def test_what_a_server_had_when_it_was_told_to_end_is_done_by_the_next(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"
    small_model(model)
    jobs = samples(model, 2)

    async def first() -> list[str]:
        async with running(data, model) as server:
            with pytest.raises(OptionError, match="Another server"):
                Server(Settings([ServedModel(MODEL, str(model))], data))
            engine = await is_ready(server)
            found = [await sent(server, one, idempotency=f"{n}") for n, one in enumerate(jobs)]
            await until(lambda: any(begun(server, job) for job in found))
            os.kill(engine, signal.SIGSTOP)  # it ends no more of them
        return [job.id for job in found]

    async def second() -> None:
        async with running(data, model) as server:
            found = [await sent(server, one, idempotency=f"{n}") for n, one in enumerate(jobs)]
            assert [job.id for job in found] == ids  # sent again, and there once
            for job, one in zip(await ended(server, *found), jobs, strict=True):
                assert (job.state, job.attempt) == ("done", 1)
                assert agrees(server.result_path(job).read_bytes(), one)

    ids = asyncio.run(first())
    with store(data) as kept:
        waiting = kept.jobs(states=("queued",))
        assert waiting and not kept.jobs(states=("leased", "running"))
        assert all(job.attempt == 0 for job in waiting)
    asyncio.run(second())


@pytest.mark.slow
def test_a_job_is_never_run_on_another_model_than_it_was_accepted_for(tmp_path: Path) -> None:
    data, model = tmp_path / "data", tmp_path / "model"

    async def left(model: Path, count: int, expected: list[tuple[str, str]]) -> None:
        """A server that ends before it has run some jobs, after it has looked at earlier ones."""
        async with running(data, model) as server:
            engine = await is_ready(server)
            before = await ended(server, *server.store.jobs(limit=len(expected)))
            assert [end(job) for job in before] == expected
            fresh, *others = samples(model, 1)[: count + 1]
            (done,) = await ended(server, await sent(server, fresh))
            assert done.state == "done"
            assert agrees(server.result_path(done).read_bytes(), fresh)
            os.kill(engine, signal.SIGSTOP)
            for one in others:
                await sent(server, one)

    small_model(model)
    asyncio.run(left(model, 2, []))
    shutil.rmtree(model)
    small_model(model, seed=1)  # other weights
    asyncio.run(left(model, 1, [FAILED] * 2))
    shutil.rmtree(model)
    small_model(model, layers=4)  # another structure
    asyncio.run(left(model, 0, [FAILED]))


@pytest.mark.thorough
def test_jobs_that_wait_for_a_model_which_cannot_be_loaded_fail(
    tmp_path: Path,
) -> None:
    """They are accepted while nobody knows, and would wait for ever."""
    data, model = tmp_path / "data", tmp_path / "model"
    small_model(model)
    one = samples(model, 1)[0]
    (model / "model.safetensors").write_bytes(b"no weights")

    async def main() -> None:
        async with running(data, model) as server:
            job = await sent(server, one)
            (found,) = await ended(server, job)
            assert found.state == "failed" and found.problem is not None
            assert server.ready() == {MODEL: "failed"}
            with pytest.raises(ProblemError):
                await sent(server, one)

    asyncio.run(main())


@pytest.mark.thorough
def test_a_model_of_short_prompts_is_served(tmp_path: Path) -> None:
    """RoBERTa has two positions less than its config says."""
    data, model = tmp_path / "data", tmp_path / "model"
    module: Any = module_of("roberta")
    module.save_pretrained(model)

    async def main() -> None:
        async with running(data, model) as server:
            await is_ready(server)

    assert module.config.max_position_embeddings <= 64
    asyncio.run(main())
