"""How tests ask a server: through ASGI alone, or over sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
from starlette.types import Message

from insitu.remote.problems import Problem
from insitu.remote.protocol import JOB_TYPE, PROBLEM_TYPE
from insitu.server.http.front import app_of
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.listening import serve
from tests.server.fake_served import ADA, RESULTS, FakeServed

JOB = {"Content-Type": JOB_TYPE}


def key(text: str = ADA) -> dict[str, str]:
    """The header with a key."""
    return {"Authorization": f"Bearer {text}"}


@asynccontextmanager
async def asked(
    served: FakeServed, limits: FrontLimits | None = None, **headers: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application itself, without sockets."""
    transport = httpx.ASGITransport(app_of(served, limits), raise_app_exceptions=True)
    given = {**key(), **headers}
    base = "http://127.0.0.1:8765"
    async with httpx.AsyncClient(transport=transport, base_url=base, headers=given) as client:
        yield client


@asynccontextmanager
async def listening(
    served: FakeServed, limits: FrontLimits | None = None, app: Any = None
) -> AsyncIterator[str]:
    """The URL of a server that listens on a free port, and has ended behind the block."""
    there: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    app = app or app_of(served, limits)
    task = asyncio.create_task(serve(app, served.settings, there.set_result, limits))
    await asyncio.wait({task, there}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            task.result()
        yield there.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def client_of(url: str, **given: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client with Ada's key."""
    async with httpx.AsyncClient(base_url=url, headers=key(), timeout=30, **given) as client:
        yield client


def problem_in(answer: httpx.Response) -> Problem:
    """The problem that an answer is, with all that has to hold of it."""
    assert answer.headers["content-type"] == PROBLEM_TYPE
    assert answer.headers["x-content-type-options"] == "nosniff"
    problem = msgspec.json.decode(answer.content, type=Problem)
    assert problem.status == answer.status_code
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return problem


async def bare(
    app: Any,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    pieces: Callable[[], Awaitable[Message]] | None = None,
    query: str = "",
) -> tuple[int, dict[str, str], bytes]:
    """Asks an application as a server of ASGI does, also what no client would send.

    Args:
        app: the application.
        method: of the request, as are the others.
        path: the same.
        headers: beside `Host` and the key; one that is "" is not sent.
        pieces: what gives the messages with the body, none unless given.
        query: the query.
    """
    own = {"host": "127.0.0.1:8765", **key()}
    given = {name.lower(): one for each in (own, headers or {}) for name, one in each.items()}
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": "",
        "query_string": query.encode(), "scheme": "http", "http_version": "1.1",
        "headers": [(n.encode(), v.encode("latin-1")) for n, v in given.items() if v != ""],
        "client": ("127.0.0.1", 9), "server": ("127.0.0.1", 8765), "extensions": {},
    }  # fmt: skip
    found: list[Message] = []
    ended = asyncio.Event()
    sent = False

    async def nothing() -> Message:
        nonlocal sent
        if sent:
            await ended.wait()
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def take(message: Message) -> None:
        found.append(message)

    try:
        await app(scope, pieces or nothing, take)
    finally:
        ended.set()
    head = next((one for one in found if one["type"] == "http.response.start"), None)
    if head is None:
        return 0, {}, b""
    body = b"".join(one.get("body", b"") for one in found if one is not head)
    return head["status"], {n.decode(): v.decode() for n, v in head["headers"]}, body


def fake(tmp_path: Path, **settings: object) -> FakeServed:
    """A server in memory."""
    return FakeServed(tmp_path, **settings)


def quick(**given: Any) -> FrontLimits:
    """Limits for tests of what is too slow."""
    return replace(FrontLimits(), **given)


def answers(
    served: FakeServed, method: str, path: str, headers: dict[str, str] | None = None, **given: Any
) -> httpx.Response:
    """What is answered to a request with Ada's key."""

    async def ask() -> httpx.Response:
        async with asked(served) as client:
            return await client.request(method, path, headers=headers, **given)

    return asyncio.run(ask())


def done(tmp_path: Path, data: bytes = RESULTS) -> FakeServed:
    """A server in memory with a job that is done."""
    served = fake(tmp_path)
    record = served.add()
    asyncio.run(served.move(record.id, "done", data=data))
    return served
