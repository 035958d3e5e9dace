import asyncio
import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from insitu import LanguageModel
from insitu.remote.problems import ProblemError
from insitu.server.engines.batches import Batch
from insitu.server.engines.messages import Ended, EngineJob
from insitu.server.storage import files
from insitu.server.storage.data_folder import full_disk_is_a_problem
from tests.conftest import tiny_gpt2
from tests.server.samples import KINDS, agrees, samples, small_model
from tests.server.whole_server import ended, is_ready, running, sent

_MEGABYTE = 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir(mode=0o700)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", str(folder)],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("a disk of its own, to be filled, is mounted by root alone")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Fills a disk until so many bytes are free."""
    state = os.statvfs(folder)
    with (folder / "filling").open("ab") as file:
        rest = state.f_bavail * state.f_frsize - left
        while rest > 0:
            rest -= file.write(bytes(min(rest, _MEGABYTE)))


@pytest.mark.thorough
def test_a_full_disk_fails_the_jobs_that_need_it_and_not_the_server(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SPARE_BYTES", _MEGABYTE)
    data, model = small_disk / "data", tmp_path / "model"
    small_model(model)
    found = dict(zip((kind.__name__ for kind in KINDS), samples(model, 1), strict=True))
    small, large = found["_reads"], found["_is_large"]

    async def main() -> None:
        async with running(data, model) as server:
            engine = await is_ready(server)
            os.kill(engine, signal.SIGSTOP)
            running_job = await sent(server, large)
            fill(data, 2 * _MEGABYTE)
            os.kill(engine, signal.SIGCONT)
            (failed,) = await ended(server, running_job)
            assert failed.state == "failed" and failed.problem is not None
            assert (failed.problem.code, failed.problem.status) == ("storage", 507)
            assert not [*server.files.results.iterdir()]

            with pytest.raises(ProblemError) as refused:  # before it is accepted
                await sent(server, large)
            assert (refused.value.problem.code, refused.value.problem.status) == ("storage", 507)
            (done,) = await ended(server, await sent(server, small))
            assert agrees(server.result_path(done).read_bytes(), small)

            os.kill(engine, signal.SIGSTOP)
            waits = await sent(server, small)
            fill(data, 0)
            with pytest.raises(ProblemError) as refused:
                await sent(server, small)
            assert refused.value.problem.status == 507
            os.kill(engine, signal.SIGCONT)
            await asyncio.sleep(1)
            (data / "filling").unlink()
            (late,) = await ended(server, waits)  # what could not be written is
            assert late.problem is None or late.problem.code == "storage"
            (done,) = await ended(server, await sent(server, large))
            assert agrees(server.result_path(done).read_bytes(), large)

    asyncio.run(main())


def test_results_that_have_no_room_fail_with_storage(tmp_path: Path) -> None:
    model = LanguageModel(tiny_gpt2())
    with model.trace([[1, 2, 3]]) as tracer:
        model.lm_head.output.save("logits")
    body = tmp_path / "body"
    body.write_bytes(tracer.job.to_bytes())
    told: list[Any] = []

    def write(*_: object) -> None:
        with full_disk_is_a_problem("the results"):
            raise OSError(errno.ENOSPC, "No space left on device")

    jobs = [EngineJob(id, 1, "ada", str(body), {}, {}) for id in "ab"]
    Batch(model, tmp_path, told.append, write).run(jobs)
    ends = [one for one in told if isinstance(one, Ended)]
    assert [one.id for one in ends] == ["a", "b"]
    assert all(one.problem is not None and one.problem.code == "storage" for one in ends)
