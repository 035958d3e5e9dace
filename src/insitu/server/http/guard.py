"""What stands around all routes: who may ask, errors as problems, slow clients, and headers.

`bounded_protocol.py` stands before it, while there is no request yet. `bodies.py` bounds the bodies
that are read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import traceback
from collections.abc import Iterator, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from insitu.remote.problems import Problem, ProblemError
from insitu.server.http.connections import connection_of
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.hosts import Hosts
from insitu.server.http.refusals import INTERNAL, ClientGoneError, answer_of, refused
from insitu.server.metrics import FrontMetrics
from insitu.server.settings import Settings

_logger = logging.getLogger("insitu.server")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))

HEAD_BYTES = 16 * 2**10
"""How long the head of a request may be."""

STOPPING = refused(503, "stopping", "The server stops. Ask again later.", retry_after=5.0).problem
"""The answer to who waits for something while the server stops."""


class Guard:
    """An ASGI middleware around all routes.

    It lets in who asks for this server and from no other site, and answers every exception with a
    problem. It closes connections of clients that do not read what they asked for, and does not
    read the body of a request that was refused.

    Args:
        app: the application inside.
        settings: what the server was told.
        limits: what a client may take.
        metrics: where requests are counted.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, limits: FrontLimits, metrics: FrontMetrics
    ) -> None:
        self._app, self._hosts, self._limits = app, Hosts(settings), limits
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        exchange = Exchange(scope, receive, send, self._limits)
        begun = time.monotonic()
        try:
            await self._answer(scope, exchange)
        except ClientGoneError:
            exchange.abort()
            await asyncio.sleep(0)  # so that it is known as gone, and nobody misses an answer
        finally:
            self._note(scope, exchange.status, time.monotonic() - begun)

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        try:
            check_head(scope)
            self._hosts.check(Request(scope))
            await self._app(scope, exchange.receive, exchange.send)
            return
        except ProblemError as error:
            problem, headers = error.problem, None
        except HTTPException as error:
            problem, headers = _problem_of_route(error), error.headers
        except asyncio.CancelledError:
            connection = connection_of(scope)
            if connection is None or not connection.stops:
                raise
            problem, headers = STOPPING, None
        except ClientGoneError:
            raise
        except Exception as error:
            # What the error says may be from a prompt. Where it was raised is not.
            where = "".join(traceback.format_tb(error.__traceback__))
            _logger.error("%s in a request:\n%s", type(error).__name__, where)
            problem, headers = INTERNAL, None
        if exchange.status:  # the answer had begun: the client is to see that it is not whole
            raise ClientGoneError
        self._metrics.refusals.add(code=problem.code)
        answer = answer_of(problem)
        answer.headers.update(headers or {})
        await answer(scope, exchange.receive, exchange.send)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """Counts a request and logs it: its route and not its path, as a path may be anything."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("endpoint"), "__name__", "none")
        self._metrics.requests.add(method=method, route=route, status=str(status or "gone"))
        _logger.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)


class Exchange:
    """A request and its answer, on their way through the guard.

    Args:
        scope: of ASGI, as are the others.
        receive: gives what comes.
        send: takes what goes.
        limits: what a client may take.

    Attributes:
        status: the status of the answer, 0 before it has begun.
        received: how many bytes of the body were read.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: FrontLimits) -> None:
        self._receive, self._send, self._limits = receive, send, limits
        self._connection = connection_of(scope)
        self._unread = _has_body(scope)
        self._closes = False
        self.status = 0
        self.received = 0

    async def receive(self) -> Message:
        """Gives what comes, and counts it."""
        with self._waiting() if self._unread else contextlib.nullcontext():
            message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self._unread = self._unread and message.get("more_body", False)
        else:
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        """Sends a piece of the answer.

        A connection with a body that was not read serves for no other request: what remains of
        the body would be read for nothing.

        Raises:
            ClientGoneError: if nobody takes it in time.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._closes = self._unread
            message["headers"] = self._headers(message.get("headers", ()))
        elif self._closes and not message.get("more_body", False):
            await self._in_time({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._in_time(message)

    def abort(self) -> None:
        """Ends the connection at once, if there is one."""
        if self._connection is not None:
            self._connection.abort()

    async def _in_time(self, message: Message) -> None:
        try:
            with self._waiting():
                async with asyncio.timeout(self._limits.idle_seconds):
                    await self._send(message)
        except TimeoutError:
            raise ClientGoneError from None

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Says that the client is waited for."""
        if self._connection is None:
            yield
            return
        self._connection.waits()
        try:
            yield
        finally:
            self._connection.goes_on()

    def _headers(self, given: Any) -> list[tuple[bytes, bytes]]:
        headers = [(name.lower(), value) for name, value in given]
        names = {name for name, _ in headers}
        headers.append((b"x-content-type-options", b"nosniff"))
        headers.append((b"cross-origin-resource-policy", b"same-origin"))
        if b"cache-control" not in names:
            headers.append((b"cache-control", b"no-store"))
        if self._closes:
            headers.append((b"connection", b"close"))
        return headers

    async def _drain(self) -> None:
        """Reads a little of a body for nothing, as many clients read no answer before it is sent.

        One that has much more to send gets a broken connection, and the answer if it looks for it.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drained_seconds):
                while self._unread and self.received < self._limits.drained_bytes:
                    await self.receive()


def check_head(scope: MutableMapping[str, Any]) -> None:
    """Raises if a head is too large, or if it is not clear where the request ends.

    h11 bounds only what comes in several pieces. And a proxy may see the end of a request
    somewhere else, if there are two ways to see it.

    Args:
        scope: of ASGI.

    Raises:
        ProblemError: 431 for a head that is too large, 400 for a length beside chunks or for
            several lengths.
    """
    size = len(scope["path"]) + len(scope.get("query_string", b""))
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > HEAD_BYTES:
        detail = f"The head of the request has more than {HEAD_BYTES:,} bytes."
        raise refused(431, "too_large", detail, found=size, allowed=HEAD_BYTES)
    names = [name for name, _ in scope["headers"]]
    lengths, chunked = names.count(b"content-length"), b"transfer-encoding" in names
    if lengths > 1 or (lengths and chunked):
        raise refused(400, "framing", "The length of the body is given in two ways.")


def _has_body(scope: MutableMapping[str, Any]) -> bool:
    headers = dict(scope["headers"])
    return headers.get(b"content-length", b"0").strip(b"0") != b"" or (
        b"transfer-encoding" in headers
    )


def _problem_of_route(error: HTTPException) -> Problem:
    """The answer where there is no route, or not with that method."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        return refused(405, "method", f"This takes the methods {allowed}.").problem
    if error.status_code == 404:
        return refused(404, "not_found", "There is nothing under this path.").problem
    return refused(error.status_code, "http", "The request cannot be answered.").problem
