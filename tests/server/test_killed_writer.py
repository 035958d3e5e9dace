import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import insitu
from insitu.remote.protocol import ENDS
from insitu.server.states import FOLLOWS, MOST_ATTEMPTS
from insitu.server.storage.files import Files
from insitu.server.storage.sqlite_store import SqliteStore

ROOT = Path(__file__).parents[2]


@pytest.fixture
def writer() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.server.killed_writer"]
    process = subprocess.Popen(
        [*command, str(Path(insitu.__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def killed(process: subprocess.Popen[str], folder: Path, seed: int, seconds: float) -> list[str]:
    """What a writer says it has been promised until it is killed, some time after it began."""
    assert process.stdin is not None and process.stdout is not None
    pipe = folder / "pipe"
    if not pipe.exists():
        os.mkfifo(pipe)
    process.stdin.write(f"{folder}\t{seed}\t{pipe}\n")
    process.stdin.flush()
    pid = int(process.stdout.readline())
    said = b""
    try:
        # Else opening it would wait for a writer that may have gone already.
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as reader:
            until = time.monotonic() + seconds
            while time.monotonic() < until:  # what is not read in time would stop it
                said += reader.read(2**20) or b""
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            os.set_blocking(reader.fileno(), True)
            said += reader.read()
    finally:
        code = int(process.stdout.readline())
    assert code == -signal.SIGKILL
    return said.decode().splitlines()


def check(folder: Path, promised: list[str]) -> None:
    """Compares what is there with what has been promised."""
    store, files = SqliteStore(folder / "store"), Files(folder)
    jobs = {job.id: job for job in store.jobs(limit=100_000)}
    events = {id: store.events(id, limit=100_000) for id in jobs}
    for line in promised:
        match line.split():
            case "state", id, "queued", digest:
                assert jobs[id].body == digest
            case "state", id, "running", attempt:
                assert jobs[id].attempt >= int(attempt)
            case "state", id, "done", result:
                assert (jobs[id].state, jobs[id].result) == ("done", result)
            case "event", id, number, run, attempt, step:
                event = events[id][int(number) - 1]
                names = {"run": int(run), "attempt": int(attempt), "step": int(step)}
                assert (event.kind, event.number, event.data) == ("token", int(number), names)
            case _:
                raise AssertionError(line)
    for id, job in jobs.items():
        assert [one.number for one in events[id]] == [*range(1, len(events[id]) + 1)]
        states = [one.data["state"] for one in events[id] if one.kind == "state"]
        assert states[0] == "queued" and states[-1] == job.state
        assert {*itertools.pairwise(states)} <= FOLLOWS
        assert sum(state in ENDS for state in states) == (job.state in ENDS)
        assert (events[id][-1].data.get("state") in ENDS) == (job.state in ENDS)
        assert states.count("leased") == job.attempt <= MOST_ATTEMPTS
        tokens = [tuple(one.data.values()) for one in events[id] if one.kind == "token"]
        assert len({*tokens}) == len(tokens)
        assert files.body_path(job.body).exists()
        assert not job.result or files.result_path(job.result).exists()
    for one in (files.bodies, files.results):
        for path in one.iterdir():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    store.close()


def kill(process: subprocess.Popen[str], folder: Path, times: int, each: int) -> None:
    dice = random.Random(times)
    promised = list[str]()
    for seed in range(times):
        promised += killed(process, folder, seed, dice.uniform(0, 0.1))
        if seed % each == each - 1:
            check(folder, promised)
    check(folder, promised)
    assert sum(" done " in line for line in promised) > times


def test_nothing_that_was_promised_is_lost_by_a_kill(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    kill(writer, tmp_path, 20, 5)


@pytest.mark.slow
def test_nothing_that_was_promised_is_lost_by_many_kills(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    kill(writer, tmp_path, 200, 20)
