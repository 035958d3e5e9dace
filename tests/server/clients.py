"""Clients that send jobs to a server which may die at any moment, and follow them to their ends.

What a client sees is checked while it goes on: events without gaps, ends that are ends, results
that are what their digests say.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec

from insitu.graph.errors import RemoteError
from insitu.remote.connection import Connection
from insitu.remote.problems import Problem
from insitu.remote.protocol import ENDS, JOB_TYPE, JobStatus
from insitu.remote.remote_job import RemoteJob
from insitu.server.states import FOLLOWS, MOST_ATTEMPTS
from tests.server.killed_server import KilledServer
from tests.server.samples import Sample, agrees

_PATIENCE = 900.0
_AGAIN = (429, 502, 503, 504)
_UNCHECKED = "too_costly_to_check"  # two workers were killed that looked at it


@dataclass(slots=True)
class Outcome:
    """What has become of a job.

    Attributes:
        id: its id.
        state: its end.
        events: its events, as number, kind and data.
        digest: that of its results.
    """

    id: str
    state: str
    events: list[tuple[int, str, dict[str, Any]]]
    digest: str | None


@dataclass(slots=True, eq=False)
class Client:
    """Sends jobs one after the other.

    Attributes:
        server: the server.
        dice: says when it hangs up, and what it sends twice.
        outcomes: what has become of the jobs.
        refusals: how often the server had enough of it.
        broken: how many connections broke.
        unchecked: how many jobs were refused as nobody could look at them.
    """

    server: KilledServer
    dice: random.Random
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    refusals: int = 0
    broken: int = 0
    unchecked: int = 0
    _connection: Connection | None = None
    _http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def run(self, name: str, sample: Sample) -> None:
        """Sends a job, follows it to its end, and checks what it gives.

        Args:
            name: a name that no other job has.
            sample: the job.
        """
        by_itself = sample.has_blobs or self.dice.random() < 0.3
        outcome, data = self._with_the_library(sample) if by_itself else self._raw(name, sample)
        check_events(outcome)
        if outcome.state == "done":
            assert hashlib.sha256(data).hexdigest() == outcome.digest
            assert agrees(data, sample), f"job {outcome.id} has other values"
        self.outcomes.append(outcome)

    def _with_the_library(self, sample: Sample) -> tuple[Outcome, bytes]:
        """As users do it."""
        job = self._submitted(sample)
        events = [(one.number, one.kind, dict(one.data)) for one in job.events()]
        status = job.status
        data = b""
        if status.state == "done":
            data = self._ask("GET", f"/v1/jobs/{job.id}/result").content
            assert [*job.result(raises=False)]
        return Outcome(job.id, status.state, events, status.digest), data

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()
        if self._connection is not None:
            self._connection.close()

    def _submitted(self, sample: Sample) -> RemoteJob:
        connection = self._connection
        if connection is None:
            connection = Connection(self.server.url, timeout=_PATIENCE)  # each start has a new key
        for _ in self._attempts():
            try:
                if self._connection is None:  # it gives up early what has never answered
                    connection.models()
                    self._connection = connection
                return connection.submit(sample.job, wait=self.dice.choice((0.0, 0.0, 5.0)))
            except RemoteError as error:
                if self._connection is None:
                    connection.close()
                elif not self._is_passing(error.status, error.code):
                    raise
        raise AssertionError

    def _raw(self, name: str, sample: Sample) -> tuple[Outcome, bytes]:
        """As a client in another language does it."""
        sent = self._send(name, sample)
        if self.dice.random() < 0.3:
            assert self._send(name, sample).id == sent.id
        events = [*self._events(sent.id)]
        if self.dice.random() < 0.1:
            assert self._send(name, sample).id == sent.id
        status = self._status(sent.id)
        data = b""
        if status.state == "done":
            answer = self._ask("GET", f"/v1/jobs/{sent.id}/result")
            assert answer.headers["etag"] == f'"{status.digest}"'
            data = answer.content
        return Outcome(sent.id, status.state, events, status.digest), data

    def _send(self, name: str, sample: Sample) -> JobStatus:
        headers = {"Content-Type": JOB_TYPE, "Idempotency-Key": name}
        answer = self._ask("POST", "/v1/jobs", headers, sample.body)
        return msgspec.json.decode(answer.content, type=JobStatus)

    def _status(self, id: str) -> JobStatus:
        return msgspec.json.decode(self._ask("GET", f"/v1/jobs/{id}").content, type=JobStatus)

    def _events(self, id: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """The events of a job, over connections of which some are hung up on."""
        last = 0
        for _ in self._attempts():
            try:
                most = self.dice.choice((1, 3, 1000))
                for event in itertools.islice(self._streamed(id, last), most):
                    last = event[0]
                    yield event
                    if event[1] == "state" and event[2]["state"] in ENDS:
                        return
            except httpx.TransportError:
                self.broken += 1

    def _streamed(self, id: str, last: int) -> Iterator[tuple[int, str, dict[str, Any]]]:
        headers = self._headers({"Last-Event-ID": str(last)} if last else {})
        url = f"{self.server.url}/v1/jobs/{id}/events"
        with self._http.stream("GET", url, headers=headers) as answer:
            if answer.status_code in _AGAIN:
                return
            assert answer.status_code == 200, answer.read()
            found: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if line:
                    found[name] = value
                elif "id" in found:
                    data = msgspec.json.decode(found["data"])
                    yield int(found["id"]), found["event"], data
                    found = {}

    def _ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> httpx.Response:
        """Asks until there is an answer."""
        for _ in self._attempts():
            try:
                given, url = self._headers(headers or {}), f"{self.server.url}{path}"
                answer = self._http.request(method, url, headers=given, content=body)
            except httpx.TransportError:
                self.broken += 1
                continue
            if answer.is_success:
                return answer
            problem = msgspec.json.decode(answer.content, type=Problem)
            assert self._is_passing(answer.status_code, problem.code), problem
        raise AssertionError

    def _is_passing(self, status: int | None, code: str) -> bool:
        """Whether a job that was not accepted may be sent again."""
        self.refusals += code == "refused"  # its jobs have ended too many engines
        self.unchecked += code == _UNCHECKED
        return status in _AGAIN or code in ("refused", _UNCHECKED)

    def _attempts(self) -> Iterator[None]:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            yield
            time.sleep(self.dice.uniform(0.02, 0.3))
        raise AssertionError(f"nothing works any more: {self.server.log}")

    def _headers(self, others: dict[str, str]) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.server.key}", **others}


def check_events(outcome: Outcome) -> None:
    """Checks the events of a job that has ended, as a client has seen them.

    Args:
        outcome: the job.
    """
    numbers = [number for number, _, _ in outcome.events]
    assert numbers == [*range(1, len(numbers) + 1)], numbers
    states = [data["state"] for _, kind, data in outcome.events if kind == "state"]
    assert states[0] == "queued" and states[-1] == outcome.state
    assert outcome.events[-1][1] == "state"
    assert sum(state in ENDS for state in states) == 1
    assert {*itertools.pairwise(states)} <= FOLLOWS, states
    if outcome.state == "failed":  # which it does only if it was begun so many times
        assert states.count("running") == MOST_ATTEMPTS, states
    else:
        assert outcome.state == "done"
        assert states.count("running") <= MOST_ATTEMPTS
