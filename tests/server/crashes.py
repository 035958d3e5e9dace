"""Kills processes of a server at random moments, while clients send jobs to it.

Each job must end once, with the right values, and nothing may be lost or come twice; see
`test_crashes.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from insitu.remote.protocol import ENDS
from insitu.server.storage.data_folder import TEMPORARY
from insitu.server.storage.files import Files
from insitu.server.storage.sqlite_store import SqliteStore
from tests.server.clients import Client, Outcome
from tests.server.killed_server import KilledServer, Kind
from tests.server.samples import Sample

_PATIENCE = 600.0
_ALL = 1_000_000
STORE = "server.db"


@dataclass(frozen=True, slots=True)
class Report:
    """What has happened.

    Attributes:
        ends: how many jobs have ended in each state.
        kills: how many processes of each kind were killed.
        again: how many times a job was begun again.
        broken: how many connections of clients broke.
        seconds: how long it took.
    """

    ends: Counter[str]
    kills: Counter[str]
    again: int
    broken: int
    seconds: float


class Crashes:
    """A server, clients that send jobs, and somebody who kills its processes.

    Args:
        folder: a folder for everything.
        model: the folder of the model.
        jobs: the kinds of jobs that are sent.
        clients: how many clients there are.
        seed: of all that is random.
    """

    def __init__(
        self, folder: Path, model: Path, jobs: Sequence[Sample], clients: int = 4, seed: int = 0
    ) -> None:
        self.server = KilledServer(folder / "data", model)
        self._jobs, self._dice = jobs, random.Random(seed)
        dice = [random.Random(f"{seed} {number}") for number in range(clients)]
        self._clients = [Client(self.server, one) for one in dice]
        self._numbers, self._sent, self._killed = threading.Lock(), 0, False
        self._raised: list[BaseException] = []
        self._kills = Counter[str]()
        self._beside = 0  # workers that went so that a template comes again

    def run(self, jobs: int, kills: Sequence[Kind]) -> Report:
        """Sends jobs, and kills processes meanwhile.

        Args:
            jobs: how many jobs, at least: more are sent until all is killed.
            kills: what is killed, in this order.

        Returns:
            What has happened, once all of it was checked.
        """
        begun = time.monotonic()
        self.server.start()
        threads = [
            threading.Thread(target=self._work, args=[client, jobs], daemon=True)
            for client in self._clients
        ]
        try:
            self.server.wait_until_it_answers()
            for thread in threads:
                thread.start()
            for number, kind in enumerate(kills, 1):
                self._kill(kind, jobs * number / (len(kills) + 1))
            self._killed = True
            self._wait_for(jobs)
            for thread in threads:
                thread.join()
        finally:
            status = self.server.stop()
            for client in self._clients:
                client.close()
        assert not self._raised, (self._raised, self._kills, self.server.log)
        assert status == 0, self.server.log
        assert not self.server.left()
        # A job is refused only if the second worker that has looked at it was killed too.
        workers = self._kills["worker"] + self._beside
        assert 2 * sum(client.unchecked for client in self._clients) <= workers
        outcomes = [one for client in self._clients for one in client.outcomes]
        again = self._check(outcomes)
        return Report(
            Counter(one.state for one in outcomes),
            self._kills,
            again,
            sum(client.broken for client in self._clients),
            time.monotonic() - begun,
        )

    @property
    def _ended(self) -> int:
        return sum(len(client.outcomes) for client in self._clients)

    def _work(self, client: Client, jobs: int) -> None:
        try:
            while not self._raised and (self._sent < jobs or not self._killed):
                with self._numbers:
                    number, self._sent = self._sent, self._sent + 1
                client.run(f"job-{number}", self._jobs[number % len(self._jobs)])
        except BaseException as error:
            self._raised.append(error)

    def _kill(self, kind: Kind, ended: float) -> None:
        """Kills something, at a moment of one kind or another."""
        moment = self._dice.random()
        if moment < 0.2:  # soon after the last time, perhaps while something is started
            time.sleep(self._dice.uniform(0, 5))
        else:
            self._wait_for(ended)
            if moment < 0.4:
                time.sleep(self._dice.uniform(0, 0.3))
            else:
                self._wait_until(self._writes if moment > 0.75 else self._runs, 5)
                time.sleep(self._dice.choice((0, self._dice.uniform(0, 0.05))))
        if any(client.refusals for client in self._clients):  # a new start forgives them
            kind = "front"
            for client in self._clients:
                client.refusals = 0
        self._wait_until(lambda: self._kills_one(kind), _PATIENCE)

    def _kills_one(self, kind: Kind) -> bool:
        """Kills something if it is there: there are workers only while they look at jobs."""
        if self.server.kill(kind):
            self._kills[kind] += 1
            return True
        if kind == "template" and self.server.kill("worker"):  # else it is not started again
            self._beside += 1
        return False

    def _wait_for(self, ended: float) -> None:
        """Waits until so many jobs have ended."""
        last, since = self._ended, time.monotonic()
        while self._ended < ended and not self._raised:
            if self._ended != last:
                last, since = self._ended, time.monotonic()
            if time.monotonic() - since > _PATIENCE:
                raise AssertionError(f"{last} jobs have ended, and then none: {self.server.log}")
            time.sleep(0.005)

    def _wait_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Waits until something holds, and not for long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._raised and not holds():
            time.sleep(0.0005)

    def _writes(self) -> bool:
        """Whether a result is being written."""
        with os.scandir(self.server.data / "results") as entries:
            return any(entry.name.startswith(TEMPORARY) for entry in entries)

    def _runs(self) -> bool:
        """Whether a job runs, as the store says."""
        uri = f"file:{self.server.data / STORE}?mode=ro"
        with contextlib.suppress(sqlite3.OperationalError):
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
                return bool(db.execute("select 1 from jobs where state = 'running'").fetchall())
        return False

    def _check(self, outcomes: Sequence[Outcome]) -> int:
        """Compares what clients have seen with what there is, and returns how many ran again."""
        assert len({one.id for one in outcomes}) == len(outcomes) == self._sent
        files = Files(self.server.data)
        store = SqliteStore(self.server.data / STORE)
        try:
            files.sweep(store.refers, grace=0)  # as a server does that is started
            kept = {job.id: job for job in store.jobs(limit=_ALL)}
            assert kept.keys() == {one.id for one in outcomes}  # none lost, and none there twice
            again = 0
            for one in outcomes:
                job = kept[one.id]
                assert job.state == one.state and job.state in ENDS
                assert job.result == (one.digest or "")
                events = [(e.number, e.kind, e.data) for e in store.events(job.id, limit=_ALL)]
                assert events == one.events
                assert files.body_path(job.body).exists()
                assert not job.result or files.result_path(job.result).exists()
                if job.state == "failed":
                    assert job.problem is not None and job.problem.code == "engine_died"
                again += sum(data.get("state") == "running" for _, _, data in events) - 1
            assert store.reserved() == 0
            for folder in (files.bodies, files.results):
                for path in folder.iterdir():
                    assert store.refers(path.name)
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
            assert all(store.refers(path.name) for path in files.blobs.iterdir())
        finally:
            store.close()
        return again
