"""HTTP/1.1 and TLS with the bounds that uvicorn does not have.

These are the time until the head of a request is there, the time of a TLS handshake, answers that
nobody takes, and the number of connections.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from insitu.server.http.connections import EXTENSION, Connections, Place
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.refusals import problem_bytes, refused

_SLOW = problem_bytes(refused(408, "slow", "The request did not come in time.").problem)
_CROWDED = problem_bytes(
    refused(503, "busy", "There are too many connections.", retry_after=1.0).problem
)


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with bounds.

    Args:
        connections: where connections are counted.
        limits: how long things may take.
        place: where it is counted already, if it is.
        given: what uvicorn makes its own with.

    Attributes:
        stopped: as of `Connection`.
    """

    def __init__(
        self,
        connections: Connections,
        limits: FrontLimits,
        place: Place | None = None,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self._counted, self._limits, self._place = connections, limits, place
        self._timer: asyncio.TimerHandle | None = None
        self._flushing: asyncio.TimerHandle | None = None
        self.stopped = asyncio.Event()
        self._inside = self.app
        self.app: Any = self._with_connection

    @property
    def stops(self) -> bool:
        """Whether the server stops."""
        return self.stopped.is_set()

    async def _with_connection(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"] = {**scope.get("extensions", {}), EXTENSION: self}
        await self._inside(scope, receive, send)

    def connection_made(self, transport: Any) -> None:
        """Counts the connection, and begins to wait for a head."""
        super().connection_made(transport)
        if self._place is None:
            self._place = self._counted.enter(address_of(transport), self.abort)
            if self._place is None:
                transport.write(_CROWDED)
                transport.close()
                return
        self._place.close = self.abort
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Counts the connection no more."""
        super().connection_lost(exc)
        self._stop_timer()
        self._unset_keepalive_if_required()
        if self._flushing is not None:
            self._flushing.cancel()
        if self._place is not None:
            self._counted.leave(self._place)

    def data_received(self, data: bytes) -> None:
        """Reads on, with a deadline for a head that is not complete."""
        if self._timer is None and not self._has_request():
            self._await_head()
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Waits for another request, or for what was written to be taken."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._flushing = self.loop.call_later(self._limits.idle_seconds, self.abort)
        elif not self._has_request() and self._place is not None:
            self._counted.waits(self._place)
        self._look()

    def timeout_keep_alive_handler(self) -> None:
        """Ends a connection that is not used any more, or on which nothing is taken."""
        if self.transport.get_write_buffer_size():
            self.abort()
        else:
            super().timeout_keep_alive_handler()

    def shutdown(self) -> None:
        """Says that the server stops, to whoever waits for something."""
        self.stopped.set()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no HTTP with a problem. It is called where h11 has raised."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            code, said = ("too_large", "too large") if status == 431 else ("http", "no HTTP/1.1")
            problem = refused(status, code, f"The request is {said}, and cannot be read.").problem
            self.transport.write(problem_bytes(problem))
            self.transport.close()
        else:
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once."""
        self.transport.abort()

    def waits(self) -> None:
        """Says that the client is waited for, in the middle of a request."""
        if self._place is not None:
            self._counted.waits(self._place)

    def goes_on(self) -> None:
        """Says that it is not waited for any more, unless the request has ended meanwhile."""
        self._look()

    def becomes_stream(self) -> None:
        """Takes it out of the count."""
        if self._place is not None:
            self._counted.leave(self._place)

    def _should_upgrade(self) -> bool:
        return False  # and nothing about it in the log, for each that asks

    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        if self._has_request():
            self._stop_timer()
            if self._place is not None:
                self._counted.works(self._place)

    def _await_head(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._limits.head_seconds, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.transport.get_write_buffer_size() or self.transport.is_closing():
            self.abort()
        else:
            self.transport.write(_SLOW)
            self.transport.close()


class TlsGate(asyncio.Protocol):
    """A connection before its TLS handshake, which is counted and has a deadline.

    Args:
        connections: where connections are counted.
        limits: how long things may take.
        context: certificates.
        inner: makes what speaks HTTP.
    """

    def __init__(
        self,
        connections: Connections,
        limits: FrontLimits,
        context: ssl.SSLContext,
        inner: Callable[[Place], BoundedProtocol],
    ) -> None:
        self._counted, self._limits = connections, limits
        self._context, self._inner = context, inner
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins the handshake, if there is room."""
        place = self._counted.enter(address_of(transport), transport.abort)
        if place is None:
            transport.abort()
            return
        transport.pause_reading()  # what comes is for the handshake
        self._task = asyncio.get_running_loop().create_task(self._shake_hands(transport, place))

    async def _shake_hands(self, transport: Any, place: Place) -> None:
        protocol = self._inner(place)
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport,
                protocol,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._limits.head_seconds,
            )
        except OSError:
            encrypted = None
        if encrypted is None:  # it has failed, or the connection was ended meanwhile
            transport.abort()
            self._counted.leave(place)
        else:
            protocol.connection_made(encrypted)


def address_of(transport: Any) -> str:
    """Returns from where a connection is, "" if that is not known.

    Args:
        transport: of asyncio.
    """
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) and peer else ""
