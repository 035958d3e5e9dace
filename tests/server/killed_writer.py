"""A process that writes jobs, events and files until it is killed; see `test_killed_writer.py`.

It is started once, without PyTorch, and forks a child whenever it is told so on its standard input.
A child says on a pipe what it has been promised, one line for each, after the store has it.
"""

import itertools
import os
import random
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    # The package itself would load PyTorch, which is not needed and takes seconds.
    package = sys.modules["insitu"] = types.ModuleType("insitu")
    package.__path__ = [sys.argv[1]]

from insitu.remote.problems import Problem
from insitu.server.records import JobRecord, Price
from insitu.server.storage.data_folder import locked
from insitu.server.storage.files import Files, put_result
from insitu.server.storage.sqlite_store import SqliteStore

DIED = Problem("engine_died", "Engine died", 500, "The engine has ended.")


def work(folder: Path, seed: int, pipe: int) -> None:
    """Does what a server does, at random, without an end."""
    dice = random.Random(seed)
    lock = locked(folder)
    store, files = SqliteStore(folder / "store"), Files(folder)
    for job in store.jobs(states=("leased", "running"), limit=10_000):
        store.give_back(job.engine, {}, DIED)

    def says(*words: object) -> None:
        os.write(pipe, (" ".join(map(str, words)) + "\n").encode())

    for number in itertools.count():
        body = dice.randbytes(dice.choice((100, 5_000, 300_000)))
        digest = files.put_body(body)
        id = f"{seed:016x}{number:016x}"
        price = Price(1, 1.0, 1.0, 1)
        job = store.add(JobRecord(id, "ada", "m", "queued", "batch", digest, price))
        says("state", job.id, "queued", digest)
        for job in dice.sample(store.waiting("m"), k=min(2, len(store.waiting("m")))):
            lease = {"engine": f"e{seed}", "lease_until": store.now() + 30}
            leased = store.move(job.id, "queued", "leased", changes=lease)
            assert leased is not None
            store.move(job.id, "leased", "running", attempt=leased.attempt)
            says("state", job.id, "running", leased.attempt)
            for step in range(dice.randrange(8)):
                event = store.tell(job.id, "token", {"run": seed, "attempt": leased.attempt,
                                                     "step": step})  # fmt: skip
                assert event is not None
                says("event", job.id, event.number, seed, leased.attempt, step)
            result = put_result(files.results, dice.randbytes(dice.choice((100, 200_000))))
            done = {"result": result, "result_bytes": 1}
            store.move(job.id, "running", "done", attempt=leased.attempt, changes=done)
            says("state", job.id, "done", result)
    lock.close()


def main() -> None:
    """Forks a child for each line, which has its folder, its seed and its pipe."""
    print("ready", flush=True)
    for line in sys.stdin:
        folder, seed, pipe = line.split("\t")
        pid = os.fork()
        if pid == 0:
            try:
                work(Path(folder), int(seed), os.open(pipe.strip(), os.O_WRONLY))
            finally:
                os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
