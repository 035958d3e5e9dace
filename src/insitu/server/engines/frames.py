"""Frames on a pipe between processes: four bytes of length, then a record as msgpack."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Any, Generic, TypeVar

import msgspec

_LENGTH = struct.Struct(">I")
MOST_BYTES = 16 * 2**20
"""How long a frame may be. Nothing large travels in frames."""

T = TypeVar("T")


class BrokenFrameError(Exception):
    """The other process sent something that is no frame, or ended in the middle of one."""


def encoded(message: Any) -> bytes:
    """Returns a record as a frame.

    Args:
        message: the record.
    """
    body = msgspec.msgpack.encode(message)
    if len(body) > MOST_BYTES:
        raise BrokenFrameError(f"a frame of {len(body):,} bytes: at most {MOST_BYTES:,}")
    return _LENGTH.pack(len(body)) + body


class Frames(Generic[T]):
    """Frames on a socket, for a process that waits for them.

    Args:
        end: the socket.
        kind: what comes in: a union of records.
    """

    def __init__(self, end: socket.socket, kind: Any) -> None:
        self.end = end
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    def send(self, message: Any) -> None:
        """Sends a record."""
        self.end.sendall(encoded(message))

    def receive(self) -> T | None:
        """Waits for the next record, and returns it; None when the other process is gone.

        Raises:
            BrokenFrameError: if what comes is no such record.
        """
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        (size,) = _LENGTH.unpack(head)
        if size > MOST_BYTES:
            raise BrokenFrameError(f"a frame of {size:,} bytes")
        body = self._exactly(size)
        if body is None:
            return None
        return _decoded(self._decoder, body)

    def _exactly(self, count: int) -> bytes | None:
        found = bytearray()
        while len(found) < count:
            try:
                more = self.end.recv(count - len(found))
            except ConnectionResetError:
                more = b""
            if not more:
                return None
            found += more
        return bytes(found)


class AsyncFrames(Generic[T]):
    """Frames on a socket, for the event loop.

    Args:
        reader: what comes in.
        writer: what goes out.
        kind: what comes in: a union of records.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any):
        self._reader, self._writer = reader, writer
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)

    @classmethod
    async def on(cls, end: socket.socket, kind: Any) -> AsyncFrames[T]:
        """Returns frames on a socket.

        Args:
            end: the socket.
            kind: as of the class.
        """
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, kind)

    async def send(self, message: Any) -> None:
        """Sends a record. What the other process does not read in time waits here.

        Raises:
            ConnectionError: if the other process is gone.
        """
        self.post(message)
        await self._writer.drain()

    def post(self, message: Any) -> None:
        """Sends a record without waiting: for records that are small, and seldom.

        Raises:
            ConnectionError: if the other process is known to be gone.
        """
        if self._writer.is_closing():
            raise ConnectionResetError
        self._writer.write(encoded(message))

    async def receive(self) -> T | None:
        """Waits for the next record, and returns it; None when the other process is gone.

        Raises:
            BrokenFrameError: if what comes is no such record.
        """
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MOST_BYTES:
                raise BrokenFrameError(f"a frame of {size:,} bytes")
            body = await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return _decoded(self._decoder, body)

    @property
    def has_ended(self) -> bool:
        """Whether the other process is known to be gone."""
        return self._reader.at_eof() or self._reader.exception() is not None

    async def close(self) -> None:
        """Closes the socket."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


def _decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes) -> T:
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BrokenFrameError(str(error)) from None
