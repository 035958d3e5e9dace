"""Sending a job: once, however often its request has to be sent."""

from __future__ import annotations

import hashlib
import secrets
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from insitu.engine.job import Job
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.remote.answers import Answer, Asking
from insitu.remote.http_client import HttpClient
from insitu.remote.job_bytes import JobBytes
from insitu.remote.job_lines import JobLines
from insitu.remote.protocol import JOB_TYPE, RESULTS_TYPE, JobPlan, JobStatus, Priority
from insitu.remote.remote_job import LAST_WORD, RemoteJob, is_id
from insitu.remote.retrying import Retries

_LONGEST_WAIT = 60.0
"""For how many seconds one request waits: proxies give up sooner or later."""


class Submission:
    """A job on its way to a server.

    Its large tensors are sent when this is made. Its own request has a key that no other has, so
    that a server takes the job once.

    Args:
        http: sends requests.
        job: the job.
        sent: the digests of tensors that the server has. Those that are sent are added.
        params: the options that go beside the job.
        attended: whether the client waits for the job: it is given up if the client vanishes.

    Raises:
        WireError: if the job holds what cannot travel.
        RemoteError: if the server cannot be reached, or takes no tensors.
    """

    def __init__(
        self,
        http: HttpClient,
        job: Job,
        sent: set[str],
        params: dict[str, str],
        attended: bool = False,
    ) -> None:
        self._http, self._params, self._attended, self._job = http, params, attended, job
        self._lines = JobLines(job)
        self._bytes = JobBytes(http, job, sent)
        digest = hashlib.sha256(self._bytes.body).hexdigest()[:32]
        self._key = f"{digest}-{secrets.token_hex(8)}"
        self._is_under_way = False

    def plan(self) -> JobPlan:
        """Returns what the job would take."""
        return self._http.told(self._post(self._asking("/v1/plan")), JobPlan, self._lines)

    def send(self, wait: float) -> RemoteJob:
        """Sends the job, and returns it as the server has it.

        Args:
            wait: for how many seconds the server is asked to wait for the results.
        """
        self._is_under_way = True
        answer = self._post(self._job_asking(wait), self._job_asking(0))
        if answer.is_good and answer.type == RESULTS_TYPE:
            id = answer.headers.get("insitu-job", "")
            if not is_id(id):
                raise self._http.strange("results of no job")
            job = RemoteJob(self._http, id, self._lines, job=self._job)
            job.take(answer.body, answer.digest)
            return job
        status = self._http.told(answer, JobStatus, self._lines)
        if not is_id(status.id):
            raise self._http.strange("a job without an id")
        return RemoteJob(self._http, status.id, self._lines, status, self._job)

    def withdraw(self) -> None:
        """Cancels the job, whose id nobody has yet. Raises nothing."""
        if not self._is_under_way:
            return
        with suppress(Exception):  # sent again, the job is the one that was sent before
            answer = self._http.ask(self._job_asking(0), Retries(LAST_WORD))
            id = self._http.told(answer, JobStatus).id
            if is_id(id):
                RemoteJob(self._http, id, self._lines).give_up()

    def _post(self, asking: Asking, then: Asking | None = None) -> Answer:
        """Sends the job, and tensors that the server has lost since it took them."""
        answer = self._http.ask(asking, then=then)
        problem = answer.problem if answer.status == 409 else None
        if problem is None or problem.code != "missing_blobs":
            return answer
        if self._bytes.put_missing(problem.digests):
            answer = self._http.ask(asking, then=then)
        return answer

    def _job_asking(self, wait: float) -> Asking:
        asking = self._asking("/v1/jobs")
        headers = {**asking.headers, "Idempotency-Key": self._key}
        wait = min(wait, _LONGEST_WAIT)
        preferences = ["attended"] * self._attended + [f"wait={wait:g}"] * (wait > 0)
        if preferences:
            headers["Prefer"] = ", ".join(preferences)
        if wait <= 0:
            return replace(asking, headers=headers)
        return replace(
            asking,
            headers=headers,
            most=self._http.largest_result,
            silence=self._http.timeout + wait,
        )

    def _asking(self, path: str) -> Asking:
        headers = {"Content-Type": JOB_TYPE}
        return Asking("POST", path, self._params, headers, self._bytes.body)


def checked_params(model: str, priority: Priority, seconds: float | None) -> dict[str, str]:
    """Returns the parameters of a request for a job.

    Args:
        model: the id of the model, "" if the server has one only.
        priority: the class of the job.
        seconds: how long it may run, None if that is not said.

    Raises:
        OptionError: if one of them is none.
    """
    there = get_args(Priority)
    if priority not in there:
        listed = " or ".join(map(repr, there))
        raise OptionError(f"`priority` is {listed}, and not {priority!r:.80}.", here())
    is_number: Any = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (is_number and 0 < seconds < float("inf")):
        raise OptionError(f"`seconds` is a number above 0, and not {seconds!r:.80}.", here())
    found = {"priority": priority} | ({"model": model} if model else {})
    return found if seconds is None else {**found, "seconds": f"{seconds:g}"}
