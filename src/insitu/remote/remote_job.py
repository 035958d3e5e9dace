"""`RemoteJob`: a job that a server has, from this process or from another one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch

from insitu.engine.failures import error_of
from insitu.engine.job import Job
from insitu.engine.results import Results
from insitu.graph.errors import (
    CancelledError,
    InsituError,
    OptionError,
    RemoteError,
    WireError,
)
from insitu.graph.location import here
from insitu.graph.tracebacks import short_tracebacks
from insitu.remote.addresses import Address
from insitu.remote.answers import Asking
from insitu.remote.http_client import HttpClient
from insitu.remote.job_events import Deadline, job_events, status_of
from insitu.remote.problems import LineOf, relocated
from insitu.remote.protocol import ENDS, JobEvent, JobStatus
from insitu.remote.result_bytes import check_digest, result_bytes
from insitu.remote.retrying import Retries

_ID = re.compile("[0-9a-f]{32}")
LAST_WORD = 3.0
"""For how many seconds a client that ends tries to cancel its job."""


class RemoteJob:
    """A job that a server has.

    It goes on when this process ends. `RemoteJob.attach(id)` finds it again.

    Args:
        http: sends requests to the server.
        id: its id there.
        line_of: finds the client's own lines.
        status: what the server has said of it, None if nothing yet.
        job: what was sent; None for one that another process has sent. The gradients of its leaves
            come back with its results.

    Attributes:
        id: its id.
        url: where its server is.
    """

    def __init__(
        self,
        http: HttpClient,
        id: str,
        line_of: LineOf,
        status: JobStatus | None = None,
        job: Job | None = None,
    ) -> None:
        self.id, self.url = id, http.url
        self._http, self._line_of = http, line_of
        self._status, self._results, self._job = status, None, job
        self._taking = threading.Lock()

    _status: JobStatus | None
    _results: Results | None

    @classmethod
    @short_tracebacks
    def attach(cls, id: str, url: str | None = None, key: str | None = None) -> RemoteJob:
        """Returns a job that was sent before, such as by another process.

        Args:
            id: its id, `job.id`.
            url: where the server is; None for what `INSITU_REMOTE` says.
            key: the key; None for that of `INSITU_KEY`, or of a server of one's own on this
                machine.

        Raises:
            OptionError: if `id` or `url` is none.
            RemoteError: if the server has no such job, or cannot be reached.
        """
        return found_job(HttpClient(Address.given_or_set(url), key), id)

    @property
    def has_results(self) -> bool:
        """Whether its results are here."""
        return self._results is not None

    @property
    def status(self) -> JobStatus:
        """What the server says of it now.

        Raises:
            RemoteError: if it has the job no longer, or cannot be reached.
        """
        if self._status is None or self._status.state not in ENDS:
            self._status = status_of(self._http, self.id)
        return self._status

    def events(self, after: int = 0) -> Iterator[JobEvent]:
        """Gives what happens to it, and what has happened, until it has ended.

        Connections that break are opened again, and no event is lost or comes twice.

        Args:
            after: the number of the last event that is known; 0 for all.

        Raises:
            RemoteError: if the server has the job no longer, or cannot be reached.
        """
        return job_events(self._http, self.id, after)

    @short_tracebacks
    def result(self, timeout: float | None = None, *, raises: bool = True) -> Results:
        """Waits until it has ended, and returns what it saves by name.

        Args:
            timeout: how many seconds to wait; None for as long as it takes.
            raises: as of `model.run`: whether what single invocations raise is raised.

        Raises:
            CancelledError: if it was cancelled.
            RemoteError: if the time is over, or for what only a server can be wrong with.
            InsituError: if something is wrong with the run, as without a server: at the user's own
                line, with what there is as `results`.
        """
        if self._results is None:
            status = self._ended(timeout)
            if status.state != "done":
                raise self._failure(status)
            self.take(result_bytes(self._http, self.id, status.digest), status.digest or "")
        assert self._results is not None
        if self._results.failed and raises:
            error = error_of(self._results.failed)
            error.results = self._results
            raise error
        return self._results

    @short_tracebacks
    def cancel(self) -> JobStatus:
        """Ends it, and returns what has become of it. One that has ended stays as it is.

        Raises:
            RemoteError: if the server has no such job, or cannot be reached.
        """
        asking = Asking("DELETE", f"/v1/jobs/{self.id}")
        self._status = self._http.asked_for(asking, JobStatus)
        return self._status

    def give_up(self) -> bool:
        """Cancels it if the server is there, and returns whether it is. Raises nothing."""
        with suppress(Exception):
            answer = self._http.ask(Asking("DELETE", f"/v1/jobs/{self.id}"), Retries(LAST_WORD))
            return answer.is_good
        return False

    def take(self, data: bytes, digest: str) -> None:
        """Takes the bytes of its results.

        Args:
            data: the bytes.
            digest: their digest, "" if it is not known.

        Raises:
            RemoteError: if they are none.
        """
        check_digest(self._http, data, digest)
        try:
            results = Results.from_bytes(data)
        except WireError as error:
            raise self._http.strange(f"results that cannot be read: {error}") from None
        results.failed = [
            replace(one, error=relocated(one.error, self._line_of)) for one in results.failed
        ]
        with self._taking:
            if self._results is not None:  # another thread has waited too, and gradients add up
                return
            if self._job is not None:
                _add_gradients(self._http, self._job, results)
            self._results, self._job = results, None

    def _ended(self, timeout: float | None) -> JobStatus:
        """What the server says of it when it has ended."""
        status = self._status
        if status is None or status.state not in ENDS:
            for _ in job_events(self._http, self.id, deadline=Deadline(timeout)):
                pass
            status = self.status
        if status.state not in ENDS:
            raise self._http.strange("the end of a job that has not ended")
        return status

    def _failure(self, status: JobStatus) -> InsituError:
        """The error for a job that has ended without results."""
        if status.problem is not None:
            return self._http.error_of(status.problem, self._line_of)
        if status.state == "cancelled":
            return CancelledError("The job was cancelled.", here())
        return RemoteError(f"The job has {status.state}.", here(), code=status.state)

    def __repr__(self) -> str:
        state = "not asked yet" if self._status is None else self._status.state
        if self._results is not None:
            state = "done"
        return f"RemoteJob({self.id!r} on {self.url}: {state})"


def found_job(http: HttpClient, id: str) -> RemoteJob:
    """Returns a job that a server has.

    Args:
        http: sends requests to it.
        id: the job.

    Raises:
        OptionError: if that is no id.
        RemoteError: if the server has no such job, or cannot be reached.
    """
    if not isinstance(id, str) or not is_id(id):
        raise OptionError(
            f"The id of a job is 32 hexadecimal digits, `job.id`, and not {id!r:.80}.", here()
        )
    return RemoteJob(http, id, lambda _: None, status_of(http, id))


def is_id(text: str) -> bool:
    """Returns whether a text is the id of a job.

    Args:
        text: the text.
    """
    return _ID.fullmatch(text) is not None


def _add_gradients(http: HttpClient, job: Job, results: Results) -> None:
    """Adds what a run has added to the gradients of a job's leaves to those of one's own."""
    if not results.gradients:
        return
    trained = job.trained
    shapes = [None if one is None else one.shape for one in results.gradients]
    if len(trained) != len(shapes) or any(
        shape not in (None, leaf.shape) for leaf, shape in zip(trained, shapes, strict=True)
    ):
        raise http.strange("gradients of other tensors")
    pairs = [
        (leaf, gradient.to(leaf.device, leaf.dtype))
        for leaf, gradient in zip(trained, results.gradients, strict=True)
        if gradient is not None
    ]
    torch.autograd.backward([leaf for leaf, _ in pairs], [gradient for _, gradient in pairs])
