"""Connections of tests that send what they like, as slowly as they like."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from insitu.remote.protocol import JOB_TYPE
from tests.server.asking import key

KEY = key()["Authorization"]
HEAD = f"Host: 127.0.0.1\r\nAuthorization: {KEY}\r\n"
POST = f"POST /v1/jobs HTTP/1.1\r\n{HEAD}Content-Type: {JOB_TYPE}\r\n"


@dataclass
class Line:
    """A connection.

    Attributes:
        reader: what comes.
        writer: what goes.
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, text: str | bytes) -> None:
        """Sends something as it is."""
        self.writer.write(text.encode() if isinstance(text, str) else text)
        await self.writer.drain()

    async def rest(self) -> bytes:
        """What comes until the connection ends, in any way."""
        found = bytearray()
        try:
            while piece := await asyncio.wait_for(self.reader.read(65536), 20):
                found += piece
        except ConnectionError:
            pass
        return bytes(found)

    async def head(self) -> bytes:
        """What comes until a head of an answer ends."""
        return await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)

    async def status(self) -> int:
        """The status of an answer without reading its body; 0 if the connection has ended."""
        try:
            return int((await self.head()).split()[1])
        except (ConnectionError, asyncio.IncompleteReadError):
            return 0

    @property
    def has_ended(self) -> bool:
        """Whether it has come to its end."""
        return self.reader.at_eof() or self.reader.exception() is not None


@asynccontextmanager
async def lines(
    url: str, count: int = 1, address: str = "127.0.0.1", buffer: int = 0
) -> AsyncIterator[list[Line]]:
    """Connections to a server.

    Args:
        url: where it is.
        count: how many.
        address: from which address they are.
        buffer: the bytes that the system keeps for them of what comes, 0 for its default.
    """
    port = urlsplit(url).port
    found: list[Line] = []
    try:
        for _ in range(count):
            one = socket.socket()
            if buffer:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            one.setblocking(False)
            one.bind((address, 0))
            await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", port))
            found.append(Line(*await asyncio.open_connection(sock=one, limit=buffer or 65536)))
        yield found
    finally:
        for one in found:
            one.writer.transport.abort()
        await asyncio.sleep(0)
