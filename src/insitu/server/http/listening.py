"""Listening for requests: uvicorn with TLS and bounds, on addresses that are safe to listen on."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from insitu.graph.errors import LoadError, OptionError
from insitu.graph.location import here
from insitu.server.http.bounded_protocol import BoundedProtocol, TlsGate
from insitu.server.http.connections import Connections, Place
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.guard import HEAD_BYTES
from insitu.server.http.hosts import is_loopback
from insitu.server.settings import Settings

_BACKLOG = 1024
_STOP_SECONDS = 5
_OTHER_FILES = 256
"""Open files beside connections: the store, results that are sent, pipes to processes."""


async def serve(
    app: ASGIApp,
    settings: Settings,
    ready: Callable[[str], None],
    limits: FrontLimits | None = None,
) -> None:
    """Listens until the task is cancelled. Signals are the caller's business.

    Streams and requests that wait end at once then, and others have a few seconds.

    Args:
        app: what answers.
        settings: what the server was told.
        ready: called with the URL once connections are accepted.
        limits: what a client may take; the defaults of `FrontLimits` unless given.

    Raises:
        OptionError: if it must not listen there, or cannot.
        LoadError: if the certificate cannot be read.
    """
    sockets = bound_sockets(settings)
    try:
        limits = fitting(limits or FrontLimits())
        connections = Connections(limits, by_address=not settings.behind_proxy)
        config = uvicorn.Config(
            app,
            http=_protocol_of(connections, limits, tls_of(settings)),  # pyright: ignore[reportArgumentType]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,  # it would have paths: the guard logs routes
            proxy_headers=False,  # no address is believed, and none is needed
            server_header=False,
            workers=1,
            timeout_keep_alive=int(limits.keep_alive_seconds),
            timeout_graceful_shutdown=_STOP_SECONDS,
            h11_max_incomplete_event_size=HEAD_BYTES,
            backlog=_BACKLOG,
        )
        told = partial(ready, url_of(settings, sockets[0]))
        await _until_cancelled(_Listener(config, connections, told), sockets)
    finally:
        for one in sockets:
            one.close()


async def _until_cancelled(listener: _Listener, sockets: list[socket.socket]) -> None:
    running = asyncio.ensure_future(listener.serve(sockets))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        listener.should_exit = True
        await running
        raise


class _Listener(uvicorn.Server):
    """uvicorn's server, without its signals.

    Args:
        config: how it listens.
        connections: where connections are counted.
        told: called once it listens.
    """

    def __init__(
        self, config: uvicorn.Config, connections: Connections, told: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._connections, self._told = connections, told

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Captures none: they are the caller's."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        try:
            self._told()
        except BaseException:
            for server in self.servers:
                server.close()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what waits, and then the rest."""
        self._connections.end_waiting()
        await super().shutdown(sockets)


def _protocol_of(
    connections: Connections, limits: FrontLimits, context: ssl.SSLContext | None
) -> Callable[..., asyncio.Protocol]:
    """What makes the protocol of a new connection."""
    if context is None:
        return partial(BoundedProtocol, connections, limits)

    def gate(**given: Any) -> TlsGate:
        def inner(place: Place) -> BoundedProtocol:
            return BoundedProtocol(connections, limits, place, **given)

        return TlsGate(connections, limits, context, inner)

    return gate


def check_exposure(settings: Settings, addresses: Sequence[str] = ()) -> None:
    """Raises if others could reach a server that anybody may use, or read the requests to it.

    Args:
        settings: what the server was told.
        addresses: the addresses that its host stands for.

    Raises:
        OptionError: in that case, with the options that are missing.
    """
    if (settings.cert is None) != (settings.tls_key is None):
        raise OptionError("TLS takes both: `--cert FILE` and `--tls-key FILE`.", here())
    if all(map(is_loopback, addresses or [settings.host])):
        return
    missing = list[str]()
    if settings.keys is None:
        missing.append("keys (`--keys FILE`; `insitu keys add` makes one)")
    if settings.cert is None and not settings.behind_proxy:
        missing.append(
            "TLS (`--cert FILE --tls-key FILE`, or `--behind-proxy` if a proxy does TLS)"
        )
    if missing:
        raise OptionError(
            f"Other machines can reach {settings.host or 'all addresses'}, which takes "
            f"{' and '.join(missing)}. Without `--host` a server is for this machine alone.",
            here(),
        )


def bound_sockets(settings: Settings) -> list[socket.socket]:
    """Returns sockets that are bound to the addresses of the host, all of them to one port.

    Args:
        settings: what the server was told.

    Raises:
        OptionError: if it must not listen there, or cannot.
    """
    host, port = settings.host.removeprefix("[").removesuffix("]"), settings.port
    found = list[socket.socket]()
    try:
        places = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        addresses = {str(place[4][0]): place for place in places}
        check_exposure(settings, [*addresses])
        for family, kind, protocol, _, address in addresses.values():
            one = socket.socket(family, kind, protocol)
            found.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            port = one.getsockname()[1]
            one.setblocking(False)
    except (OSError, OverflowError, UnicodeError) as error:
        for one in found:
            one.close()
        if isinstance(error, OptionError):
            raise
        why = getattr(error, "strerror", None) or str(error)
        raise OptionError(
            f"There can be no server at {settings.host}, port {settings.port}: {why}. Give another "
            "port with `--port`, or `--port 0` for any that is free.",
            here(),
        ) from None
    return found


def url_of(settings: Settings, one: socket.socket) -> str:
    """Returns the URL of a server.

    Args:
        settings: what it was told.
        one: a socket on which it listens.
    """
    host = settings.host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        if not host or ipaddress.ip_address(host).is_unspecified:
            host = settings.hosts[0] if settings.hosts else socket.gethostname()
    scheme = "http" if settings.cert is None else "https"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{one.getsockname()[1]}"


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """Returns how connections are encrypted, None if they are not.

    Args:
        settings: what the server was told.

    Raises:
        LoadError: if there is no such certificate, or if its key is another's.
    """
    if settings.cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:  # a key with a password is refused, and not asked for
        context.load_cert_chain(settings.cert, settings.tls_key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise LoadError(
            f"The certificate '{settings.cert}' with the key '{settings.tls_key}' cannot be read: "
            f"{error.strerror if isinstance(error, OSError) and error.strerror else error}.",
            here(),
        ) from None
    return context


def fitting(limits: FrontLimits) -> FrontLimits:
    """Returns limits for as many connections as this process may have files.

    Args:
        limits: the limits that are wanted.
    """
    wanted = limits.connections + limits.streams + _OTHER_FILES
    try:
        import resource
    except ImportError:  # Windows
        return limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            there = wanted if hard == unlimited else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (there, hard))
            soft = there
    if soft == unlimited or soft >= wanted:
        return limits
    share = max(soft - _OTHER_FILES, 16) / (wanted - _OTHER_FILES)
    return replace(
        limits,
        connections=max(8, int(limits.connections * share)),
        streams=max(8, int(limits.streams * share)),
    )
