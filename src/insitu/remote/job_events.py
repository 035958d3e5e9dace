"""The events of a job, followed over connections that break."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import msgspec

from insitu.graph.errors import RemoteError
from insitu.graph.location import here
from insitu.remote.answers import Asking
from insitu.remote.http_client import TRY_AGAIN, HttpClient, TransportError
from insitu.remote.protocol import ENDS, JobEvent, JobStatus
from insitu.remote.retrying import Retries
from insitu.remote.server_sent_events import SentEvent, TooLongError, sent_events

_SILENCE = 45.0
"""How long a stream may be silent: a server says every 15 seconds that it is there."""

_KINDS = frozenset(get_args(get_type_hints(JobEvent)["kind"]))
_MOST_DIGITS = 18


class Deadline:
    """The end of somebody's patience.

    Args:
        seconds: in how many seconds; None for never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self, most: float) -> float:
        """Returns how many seconds are left.

        Args:
            most: the most to return.

        Raises:
            RemoteError: if none are.
        """
        if self._end is None:
            return most
        left = self._end - time.monotonic()
        if left <= 0:
            raise RemoteError(
                f"The job has not ended within {self._seconds:g} seconds. It goes on: ask again, "
                "or `cancel()` it.",
                here(),
                code="timeout",
            )
        return min(left, most)


def job_events(
    http: HttpClient, id: str, after: int = 0, deadline: Deadline | None = None
) -> Iterator[JobEvent]:
    """Gives the events of a job, each once and in their order, until it has ended.

    Args:
        http: sends requests.
        id: the job.
        after: the number of the last event that is known; 0 for all.
        deadline: until when to wait.

    Raises:
        RemoteError: if there is no such job, if the server cannot be reached for long, or if the
            deadline passes.
    """
    deadline = deadline or Deadline(None)
    retries = Retries(http.timeout)
    while True:
        lost, before = TransportError("its events broke off"), after
        is_whole = False
        try:
            for event in _connected(http, id, after, deadline):
                retries.went_well()
                if event is None or event.number <= after:
                    continue
                after = event.number
                if event.kind in _KINDS:  # a later version may tell of more
                    yield event
                if is_end(event):
                    return
            is_whole = True
        except TransportError as error:
            lost = error
        deadline.left(_SILENCE)
        ended = status_of(http, id).state in ENDS
        if ended and is_whole and after == before:  # the last event is known
            return
        if ended and not retries.another():
            return
        if not ended:
            http.try_again(retries, lost)


def status_of(http: HttpClient, id: str) -> JobStatus:
    """Returns what a server says of a job.

    Args:
        http: sends requests.
        id: the job.

    Raises:
        RemoteError: if there is no such job.
    """
    status = http.asked_for(Asking("GET", f"/v1/jobs/{id}"), JobStatus)
    if status.id != id:
        raise http.strange("the status of another job")
    return status


def is_end(event: JobEvent) -> bool:
    """Returns whether an event is the last of its job.

    Args:
        event: the event.
    """
    state = event.data.get("state")
    return event.kind == "state" and isinstance(state, str) and state in ENDS


def _connected(
    http: HttpClient, id: str, after: int, deadline: Deadline
) -> Iterator[JobEvent | None]:
    """The events of one connection, and None for each sign of life."""
    headers = {"Accept": "text/event-stream"}
    if after:
        headers["Last-Event-ID"] = str(after)
    silence = deadline.left(_SILENCE)
    asking = Asking("GET", f"/v1/jobs/{id}/events", headers=headers, silence=silence)
    with http.streamed(asking) as (answer, pieces):
        if answer.status in TRY_AGAIN:
            raise TransportError(f"the server has answered with {answer.status}")
        if not answer.is_good:
            raise http.error(http.read(answer, pieces, asking))
        if answer.type != "text/event-stream":
            raise http.strange(f"{answer.type or 'something'!r} in place of events")
        try:
            for sent in sent_events(pieces):
                deadline.left(_SILENCE)
                yield None if sent is None else _event(http, sent)
        except TooLongError:
            raise http.strange("an event that does not end") from None


def _event(http: HttpClient, sent: SentEvent) -> JobEvent:
    number = sent.id if sent.id.isascii() and sent.id.isdigit() else ""
    try:
        data = msgspec.json.decode(sent.data, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise http.strange(f"an event that is none: {error}") from None
    if not 0 < len(number) <= _MOST_DIGITS:
        raise http.strange("an event without a number")
    kind: Any = sent.kind
    return JobEvent(int(number), kind, data)
