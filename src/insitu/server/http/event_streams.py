"""What happens to a job, as server-sent events that a client can go on with after any break.

Events wait in a queue of a bounded length for a client that is slow to read. If it stays full the
connection is closed: the client goes on with `Last-Event-ID`, or asks for the state instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from insitu.remote.protocol import JobEvent
from insitu.server.http.connections import connection_of
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.refusals import ClientGoneError
from insitu.server.http.tenant_counts import TenantCount

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep events back until it has many
    (b"connection", b"close"),  # such a connection is counted apart, and is not used again
]
_MOST_BYTES = 64 * 2**10
_ALIVE = b": alive\n\n"


def written(event: JobEvent) -> bytes:
    """Returns an event as it is sent.

    Args:
        event: the event. In JSON there is no line break, so its data is one line.
    """
    data = msgspec.json.encode(event.data)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.number, event.kind.encode(), data)


class EventStream:
    """An answer with the events of a job, as they come.

    Args:
        events: the events.
        tenant: the id of whose job it is.
        streams: counts streams.
        limits: how long things may take.
    """

    def __init__(
        self,
        events: AsyncIterator[JobEvent],
        tenant: str,
        streams: TenantCount,
        limits: FrontLimits,
    ) -> None:
        self._events, self._tenant = events, tenant
        self._streams, self._limits = streams, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events, until the last one or until nobody reads them.

        Raises:
            ClientGoneError: if nobody reads them any more, or not fast enough.
        """
        with self._streams.one_of(self._tenant):
            connection = connection_of(scope)
            if connection is not None:
                connection.becomes_stream()
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            if scope["method"] != "HEAD":
                ends: list[Coroutine[Any, Any, Any]] = [_gone(receive)]
                if connection is not None:
                    ends.append(connection.stopped.wait())
                await self._follow(send, ends)
            await send({"type": "http.response.body", "body": b""})

    async def _follow(self, send: Send, ends: list[Coroutine[Any, Any, Any]]) -> None:
        """Fills and empties the queue, until the events end or the client does, or the server."""
        queue = asyncio.Queue[JobEvent | None](self._limits.queued_events)
        filling = asyncio.ensure_future(self._fill(queue))
        sending = asyncio.ensure_future(self._send(queue, send))
        ending = [asyncio.ensure_future(one) for one in ends]
        waited = {filling, sending, *ending}
        try:
            while not sending.done() and not any(one.done() for one in ending):
                done, waited = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            tasks = filling, sending, *ending
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    async def _fill(self, queue: asyncio.Queue[JobEvent | None]) -> None:
        async for event in self._events:
            await self._put(queue, event)
        await self._put(queue, None)

    async def _put(self, queue: asyncio.Queue[JobEvent | None], event: JobEvent | None) -> None:
        """Puts an event into the queue. Who takes none for so long reads too slowly."""
        try:
            async with asyncio.timeout(self._limits.queue_seconds):
                await queue.put(event)
        except TimeoutError:
            raise ClientGoneError from None

    async def _send(self, queue: asyncio.Queue[JobEvent | None], send: Send) -> None:
        ended = False
        while not ended:
            text = bytearray()
            try:
                async with asyncio.timeout(self._limits.heartbeat_seconds):
                    event = await queue.get()
                while event is not None:
                    text += written(event)
                    if queue.empty() or len(text) >= _MOST_BYTES:
                        break
                    event = queue.get_nowait()
                ended = event is None
            except TimeoutError:
                text += _ALIVE
            if text:
                piece = {"type": "http.response.body", "body": bytes(text), "more_body": True}
                await send(piece)


async def _gone(receive: Receive) -> None:
    """Waits until the client is not there any more.

    Raises:
        ClientGoneError: then.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError
