"""What the query of a request asks for: each parameter is known, and has a value of its kind."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import cast, get_args
from urllib.parse import parse_qsl

from starlette.requests import Request

from insitu.graph.errors import nearest
from insitu.remote.problems import ProblemError
from insitu.remote.protocol import JobState, Priority
from insitu.server.http.refusals import refused
from insitu.server.http.request_headers import idempotency_of, preferences
from insitu.server.records import Asked

_ASKED = ("model", "priority", "seconds")
_PAGE = ("state", "after", "limit")
_LONGEST_PAGE = 1_000
_LONGEST_VALUE = 512
_CURSOR = re.compile(r"[0-9A-Za-z._-]{0,18}")
_MOST_VALUES = 16


def query_of(request: Request, known: Collection[str]) -> dict[str, str]:
    """Returns the parameters of a query, each of them once.

    Args:
        request: the request.
        known: the parameters that there are.

    Raises:
        ProblemError: 422 for another one, naming the nearest, for one that is there twice, and for
            bytes that are no text.
    """
    raw = request.scope["query_string"].decode("latin-1")
    try:
        pairs = parse_qsl(raw, True, errors="strict", max_num_fields=_MOST_VALUES)
    except ValueError:
        detail = f"The query is no UTF-8 text of at most {_MOST_VALUES} parameters."
        raise _wrong(detail) from None
    found = dict[str, str]()
    for name, value in pairs:
        if name not in known:
            there = ", ".join(f"`{one}`" for one in known) or "none"
            shown = name[:50]
            raise _wrong(
                f"There is no parameter {shown!r} here{nearest(shown, known)}. There are: {there}."
            )
        if name in found:
            raise _wrong(f"The parameter `{name}` is there more than once.")
        if len(value) > _LONGEST_VALUE:
            raise _wrong(f"The value of `{name}` is longer than {_LONGEST_VALUE} characters.")
        found[name] = value
    return found


def asked_of(request: Request) -> Asked:
    """Returns what somebody asks for beside the job itself.

    Raises:
        ProblemError: 422 for what there is not.
    """
    query = query_of(request, _ASKED)
    priority, seconds = query.get("priority", "interactive"), None
    if priority not in get_args(Priority):
        raise _no_choice("priority", priority, get_args(Priority))
    if "seconds" in query:
        seconds = _seconds(query["seconds"])
    attended = "attended" in preferences(request.headers.getlist("prefer"))
    model, idempotency = query.get("model", ""), idempotency_of(request)
    return Asked(model, cast(Priority, priority), seconds, idempotency, attended)


def page_of(request: Request) -> tuple[frozenset[JobState], str, int]:
    """Returns which jobs are asked for: in which states, behind which one, and how many.

    Raises:
        ProblemError: 422 for what there is not.
    """
    query = query_of(request, _PAGE)
    states = [one for one in query.get("state", "").split(",") if one]
    for state in states:
        if state not in get_args(JobState):
            raise _no_choice("state", state, get_args(JobState))
    limit = query.get("limit", "100")
    if not re.fullmatch(r"[0-9]{1,6}", limit) or not 1 <= int(limit) <= _LONGEST_PAGE:
        raise _wrong(f"`limit` is {limit[:50]!r}, and no number from 1 to {_LONGEST_PAGE:,}.")
    after = query.get("after", "")
    if not _CURSOR.fullmatch(after):
        raise _wrong(f"`after` is {after[:50]!r}, and not what the page before has said.")
    return cast(frozenset[JobState], frozenset(states)), after, int(limit)


def event_number(given: str | None) -> int:
    """Returns the number of the event behind which a client goes on, from `Last-Event-ID`.

    Args:
        given: the header, None if there is none.

    Raises:
        ProblemError: 422 if it is no number.
    """
    if not given:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise _wrong(f"`Last-Event-ID` is {given[:50]!r}, and no number of an event.")
    return int(given)


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf and re.fullmatch(r"[0-9.eE+-]+", given)):
        raise _wrong(f"`seconds` is {given[:50]!r}, and no number above 0.")
    return seconds


def _no_choice(name: str, given: str, there: Collection[str]) -> ProblemError:
    shown = given[:50]
    choices = ", ".join(f"`{one}`" for one in there)
    return _wrong(f"`{name}` is {shown!r}{nearest(shown, there)}. There are: {choices}.")


def _wrong(detail: str) -> ProblemError:
    return refused(422, "option", detail)
