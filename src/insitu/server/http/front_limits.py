"""What a client of the HTTP front may take: time, connections, streams and memory, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FrontLimits:
    """What a client of the HTTP front may take.

    Attributes:
        head_seconds: until the head of a request is there, from the moment that the connection is.
            A TLS handshake has the same again.
        keep_alive_seconds: how long a connection may wait for another request. More than clients
            keep one, so that they are who closes it.
        idle_seconds: between two pieces of a body, and until a piece of an answer is taken.
        body_seconds: what the whole of a body may take, beside what `body_rate` gives it.
        body_rate: bytes of a body that have to come in a second, on the average, after that.
        body_memory: bytes of a body that are kept in memory while it comes. More go to a file.
        ready_memory: bytes of all bodies together that are complete and are being looked at. A
            body that is larger is looked at alone.
        bodies: how many bodies a tenant may send at once, until their requests are answered.
        uploads: how many bodies larger than `body_memory` a tenant may send at once. Others wait.
        connections: how many connections there may be, without streams.
        connections_of_address: how many of them from one address.
        streams: how many event streams there may be.
        streams_of_tenant: how many of them a tenant may have.
        downloads: how many results a tenant may be sent at once.
        waits: how many requests of a tenant may wait for their jobs. Others are answered at once.
        longest_wait: seconds that a request may wait for its job, even if it prefers more.
        heartbeat_seconds: after how long without an event a stream says that it is alive.
        queued_events: how many events are kept for a client that is slow to read them.
        queue_seconds: how long they may stay that many before its stream is closed.
        drained_bytes: bytes of a body that nobody wants which are read all the same, so that a
            client gets the answer and not a broken connection.
        drained_seconds: how long that may take.
    """

    head_seconds: float = 10.0
    keep_alive_seconds: float = 75.0
    idle_seconds: float = 20.0
    body_seconds: float = 30.0
    body_rate: float = 16 * 2**10
    body_memory: int = 256 * 2**10
    ready_memory: int = 256 * 2**20
    bodies: int = 128
    uploads: int = 4
    connections: int = 1_000
    connections_of_address: int = 256
    streams: int = 1_000
    streams_of_tenant: int = 64
    downloads: int = 64
    waits: int = 128
    longest_wait: float = 60.0
    heartbeat_seconds: float = 15.0
    queued_events: int = 256
    queue_seconds: float = 10.0
    drained_bytes: int = 2**20
    drained_seconds: float = 2.0
