"""`Connection`: a server of Insitu, as a client sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

from insitu.engine.job import Job
from insitu.engine.results import Results
from insitu.engine.seams import Cancel
from insitu.graph.errors import CancelledError, RemoteError, nearest
from insitu.graph.location import here
from insitu.graph.tracebacks import short_tracebacks
from insitu.remote.addresses import Address
from insitu.remote.answers import Asking
from insitu.remote.http_client import LARGEST_RESULT, HttpClient
from insitu.remote.protocol import (
    JobEvent,
    JobPlan,
    ModelList,
    ModelStatus,
    Priority,
    Skeleton,
    Usage,
)
from insitu.remote.remote_job import RemoteJob, found_job
from insitu.remote.retrying import now, pause
from insitu.remote.skeletons import (
    MOST_BYTES,
    cached_skeleton,
    digest_of,
    keep_skeleton,
    skeleton_from_bytes,
)
from insitu.remote.submission import Submission, checked_params

_WAIT = 20.0
"""For how many seconds a server is asked to wait for results, which saves two requests."""

_LOADING = 0.2
"""Every so many seconds a server is asked whether it has loaded a model."""

_LOOK = 0.05
"""Every so many seconds somebody looks whether a run was cancelled."""


class Connection:
    """A server of Insitu.

    Nothing is sent before it is asked for something. Several threads can use it at once.

    Args:
        url: where it is, such as "http://127.0.0.1:8000"; None for what `INSITU_REMOTE` says.
        key: the key; None for that of `INSITU_KEY`, or of a server of one's own on this machine.
        timeout: how many seconds the server may be silent, and how long to try again where it
            cannot be reached or has no room.
        largest_result: how many bytes the results of one job may have.
        transport: what sends requests in place of a network: a transport of httpx.

    Attributes:
        url: where it is.

    Raises:
        OptionError: if `url` is none.

    Example:
        `Connection("http://127.0.0.1:8000").run(tracer.job)["logits"]`
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        *,
        largest_result: int = LARGEST_RESULT,
        transport: Any = None,
    ) -> None:
        address = Address.given_or_set(url)
        self.url = address.url
        self._http = HttpClient(address, key, timeout, largest_result, transport)
        self._sent: set[str] = set()  # the digests of tensors

    @short_tracebacks
    def submit(
        self,
        job: Job,
        *,
        model: str = "",
        priority: Priority = "interactive",
        seconds: float | None = None,
        wait: float = 0,
    ) -> RemoteJob:
        """Sends a job, and returns it as the server has it.

        Args:
            job: the job.
            model: the id of its model on the server; "" if that has one only.
            priority: "interactive" if somebody waits for it, else "batch".
            seconds: how long it may run; None for as long as the server lets it.
            wait: for how many seconds to wait for its results, which come with the answer if they
                are there by then.

        Raises:
            WireError: if it holds what cannot travel.
            RemoteError: if the server cannot be reached, or refuses it.
            InsituError: if something is wrong with it, at the line that was recorded.
        """
        params = checked_params(model, priority, seconds)
        return _sent(Submission(self._http, job, self._sent, params), wait)

    @short_tracebacks
    def run(
        self,
        job: Job,
        on_event: Callable[[JobEvent], object] | None = None,
        cancel: Cancel | Sequence[Cancel] | None = None,
        *,
        model: str = "",
        priority: Priority = "interactive",
        seconds: float | None = None,
        wait: float | None = None,
        raises: bool = True,
    ) -> Results:
        """Sends a job, waits for it, and returns what it saves by name.

        An interrupt from the keyboard cancels it.

        Args:
            job: the job.
            on_event: is told what happens to it. What it raises cancels the job.
            cancel: ends it from outside, when `cancel.cancel()` is called; or several, and each of
                them does.
            model: as of `submit`, and so are the others.
            priority: as of `submit`.
            seconds: as of `submit`.
            wait: for how many seconds the results are awaited before anything is told. Unless
                given, none if there is `on_event` or `cancel`.
            raises: as of `model.run`: whether what single invocations raise is raised.

        Raises:
            CancelledError: if it was cancelled.
            RemoteError: if the server cannot be reached, refuses it, or has failed.
            InsituError: if something is wrong with the run, as without a server.
        """
        params = checked_params(model, priority, seconds)
        cancels = [] if cancel is None else [cancel] if isinstance(cancel, Cancel) else [*cancel]
        if _is_cancelled(cancels):
            raise CancelledError("The job was cancelled before it was sent.", here())
        if wait is None:
            wait = _WAIT if on_event is None and not cancels else 0.0
        sent = _sent(Submission(self._http, job, self._sent, params, attended=True), wait)
        try:
            with _cancelled_by(cancels, sent):
                if on_event is not None and not sent.has_results:
                    _tell(sent, on_event)
                return sent.result(raises=raises)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt
                sent.give_up()
            raise

    @short_tracebacks
    def plan(self, job: Job, *, model: str = "") -> JobPlan:
        """Says what a job would take, and when it would run. Nothing runs.

        Args:
            job: the job.
            model: as of `submit`.

        Raises:
            RemoteError: if the server cannot be reached, or would refuse it.
            InsituError: if something is wrong with it, at the line that was recorded.
        """
        params = {"model": model} if model else {}
        return Submission(self._http, job, self._sent, params).plan()

    @short_tracebacks
    def models(self) -> ModelList:
        """Returns the models that the server has.

        Raises:
            RemoteError: if it cannot be reached, or refuses.
        """
        return self._http.asked_for(Asking("GET", "/v1/models"), ModelList)

    @short_tracebacks
    def weights_of(self, id: str) -> str:
        """Returns the digest of a model's weights, and waits for it while they are loaded.

        Args:
            id: the model on the server.

        Returns:
            The digest, "" if the server does not tell.

        Raises:
            RemoteError: if the server cannot be reached, has no such model, or loads for too long.
        """
        end = now() + self._http.timeout
        while (model := self._model(id)).state == "loading" and not model.weights:
            if now() > end:
                what = f"{self.url} still loads {id!r}, so that its weights cannot be compared."
                raise RemoteError(what, here(), code="busy", status=503)
            pause(_LOADING)
        return model.weights

    @short_tracebacks
    def skeleton(self, id: str = "") -> Skeleton:
        """Returns what a model without weights is made from, from the cache if it is there.

        Args:
            id: the model on the server; "" if that has one only.

        Raises:
            RemoteError: if the server cannot be reached, or has no such model.
        """
        model = self._model(id)
        found = cached_skeleton(model.skeleton)
        if found is not None:
            return found
        path = f"/v1/models/{quote(model.id, safe='/')}/skeleton"
        answer = self._http.ask(Asking("GET", path, most=MOST_BYTES))
        if not answer.is_good:
            raise self._http.error(answer)
        try:
            skeleton = skeleton_from_bytes(answer.body)
        except ValueError as error:
            raise self._http.strange(f"a skeleton that is none: {error}") from None
        if digest_of(answer.body) != (answer.digest or model.skeleton):
            raise self._http.strange("a skeleton that is not what its digest says")
        keep_skeleton(answer.body)
        return skeleton

    @short_tracebacks
    def usage(self) -> Usage:
        """Returns what one has used today, and what one may.

        Raises:
            RemoteError: if the server cannot be reached, or refuses.
        """
        return self._http.asked_for(Asking("GET", "/v1/usage"), Usage)

    @short_tracebacks
    def job(self, id: str) -> RemoteJob:
        """Returns a job that was sent before.

        Args:
            id: its id.

        Raises:
            OptionError: if that is no id.
            RemoteError: if the server cannot be reached, or has no such job.
        """
        return found_job(self._http, id)

    def close(self) -> None:
        """Closes all open connections. A later request opens one again."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Connection({self.url!r})"

    def _model(self, id: str) -> ModelStatus:
        """A model that the server has."""
        there = self.models().models
        found = [one for one in there if one.id == id or (not id and len(there) == 1)]
        if found:
            return found[0]
        listed = ", ".join(repr(one.id) for one in there[:20]) or "none"
        what = f"no model {id!r}{nearest(id, [one.id for one in there])}" if id else "no one model"
        raise RemoteError(
            f"{self.url} has {what}. Its models: {listed}.", here(), code="not_found", status=404
        )


def _sent(submission: Submission, wait: float) -> RemoteJob:
    """Sends a job. An interrupt, while its id is not known yet, cancels it."""
    try:
        return submission.send(wait)
    except BaseException as error:
        if not isinstance(error, Exception):
            submission.withdraw()
        raise


def _tell(job: RemoteJob, on_event: Callable[[JobEvent], object]) -> None:
    """Tells somebody of the events of a job. What he raises cancels it."""
    for event in job.events():
        try:
            on_event(event)
        except Exception:
            job.give_up()
            raise
    _ = job.status  # it has ended, so that nobody follows it again


def _is_cancelled(cancels: Sequence[Cancel]) -> bool:
    return any(one.is_cancelled for one in cancels)


@contextmanager
def _cancelled_by(cancels: Sequence[Cancel], job: RemoteJob) -> Generator[None]:
    """Cancels a job on its server as soon as a run is cancelled here."""
    if not cancels:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_LOOK):
            if _is_cancelled(cancels) and job.give_up():
                return

    thread = threading.Thread(target=watch, name="insitu-cancel", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
