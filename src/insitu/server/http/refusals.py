"""Problems of the front's own, and problems as answers of HTTP."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec
from starlette.responses import Response

from insitu.remote.problems import Problem, ProblemError
from insitu.remote.protocol import PROBLEM_TYPE


class ClientGoneError(Exception):
    """Nobody is there any more to be answered."""


def refused(
    status: int,
    code: str,
    detail: str,
    *,
    limit: str | None = None,
    found: float = 0.0,
    allowed: float = 0.0,
    retry_after: float = 0.0,
) -> ProblemError:
    """Returns a problem to raise, with the title that its status has.

    Args:
        status: the HTTP status.
        code: what it is, for machines.
        detail: what was found, and what to do instead.
        limit: of a limit that was passed, its name.
        found: how much was asked for.
        allowed: how much is allowed.
        retry_after: after how many seconds to try again.
    """
    made = Problem(
        code,
        HTTPStatus(status).phrase,
        status,
        detail,
        limit=limit,
        found=found,
        allowed=allowed,
        retry_after=retry_after,
    )
    return ProblemError(made)


def too_large(limit: str, found: int, allowed: int) -> ProblemError:
    """Returns the problem of a body that is too large.

    Args:
        limit: the name of the limit.
        found: its bytes, as far as they are known.
        allowed: how many it may have.
    """
    detail = f"The body has {found:,} bytes or more, and may have {allowed:,}: see `{limit}`."
    return refused(413, "too_large", detail, limit=limit, found=found, allowed=allowed)


INTERNAL = Problem(
    "internal",
    "Internal Server Error",
    500,
    "The server failed, and its log says where. What was accepted before is not lost.",
)
"""The answer where the server itself is wrong: nothing of the inside."""


def answer_of(problem: Problem) -> Response:
    """Returns a problem as an answer.

    Args:
        problem: the problem. A status that is none of an error is sent as 500.
    """
    if not 400 <= problem.status < 600:
        problem = msgspec.structs.replace(problem, status=500)
    headers = dict[str, str]()
    if problem.retry_after > 0:
        headers["Retry-After"] = str(math.ceil(min(problem.retry_after, 86_400)))
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(problem), problem.status, headers, PROBLEM_TYPE)


def problem_bytes(problem: Problem) -> bytes:
    """Returns a problem as a whole HTTP answer, for where no request could be read.

    Args:
        problem: the problem.
    """
    body = msgspec.json.encode(problem)
    head = (
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
        f"Content-Type: {PROBLEM_TYPE}\r\nContent-Length: {len(body)}\r\n"
        "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
