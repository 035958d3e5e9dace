"""How bodies of requests are read: bounded while they come, in bytes, in time and in memory.

What comes is kept in a file once it is more than a little, so that many slow clients take no
memory. It is bytes in memory when it is complete, and all such bodies together have a bound too.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import re
import tempfile
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.refusals import ClientGoneError, refused, too_large
from insitu.server.http.request_headers import only
from insitu.server.http.tenant_counts import TenantCount
from insitu.server.storage.data_folder import full_disk_is_a_problem, write_all


class Bodies:
    """Reads bodies.

    Args:
        limits: what a client may take.
        folder: where files are made. They have no name, so that none is left when the server ends
            in any way.
    """

    def __init__(self, limits: FrontLimits, folder: Path) -> None:
        self._limits, self._folder = limits, folder
        self._ready = Budget(limits.ready_memory)
        self._uploads = dict[str, asyncio.Semaphore]()
        self._count = TenantCount("bodies", limits.bodies)

    @asynccontextmanager
    async def body_of(
        self, request: Request, tenant: str, most: int, limit: str
    ) -> AsyncIterator[bytes]:
        """Gives the body of a request. It counts as memory until the block ends.

        Args:
            request: the request.
            tenant: the id of who sends it.
            most: the bytes that it may have.
            limit: the name of that limit.

        Raises:
            ProblemError: 413 if it has more, without reading on. 408 if it does not come in time.
                400 if it is not as long as it says. 429 if the tenant sends too many. 507 if the
                disk is full.
            ClientGoneError: if the client goes away.
        """
        async with self._arrived(request, tenant, most, limit) as (kept, file):
            size = len(kept) if file is None else os.fstat(file.fileno()).st_size
            async with self._ready.of(size):
                yield bytes(kept) if file is None else await run_in_threadpool(_whole, file)

    @asynccontextmanager
    async def view_of(
        self, request: Request, tenant: str, most: int, limit: str
    ) -> AsyncIterator[bytes | memoryview]:
        """Gives the body of a request, as a view of a file that takes no memory if it is large.

        Args:
            request: as of `body_of`.
            tenant: as of `body_of`.
            most: as of `body_of`.
            limit: as of `body_of`.

        Raises:
            ProblemError: as of `body_of`.
            ClientGoneError: as of `body_of`.
        """
        async with self._arrived(request, tenant, most, limit) as (kept, file):
            if file is None:
                yield bytes(kept)
                return
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                with memoryview(mapped) as view:
                    yield view

    @asynccontextmanager
    async def _arrived(
        self, request: Request, tenant: str, most: int, limit: str
    ) -> AsyncIterator[tuple[bytearray, IO[bytes] | None]]:
        """Gives all of a body: the bytes in memory, or the file with them."""
        declared = declared_length(request)
        if declared is not None and declared > most:
            raise too_large(limit, declared, most)
        arriving = Arriving(request, most, limit, self._limits)
        kept, file = bytearray(), None
        async with AsyncExitStack() as stack:
            stack.enter_context(self._count.one_of(tenant))
            async for piece in arriving.pieces():
                kept += piece
                if len(kept) > self._limits.body_memory:
                    if file is None:
                        await stack.enter_async_context(self._upload_of(tenant))
                        arriving.begin_again()  # it is not the client that was waited for
                        file = stack.enter_context(self._file())
                    await _written(file, kept)
                    kept = bytearray()
            if declared is not None and declared != arriving.received:
                raise refused(400, "framing", "The body is not as long as its header says.")
            if file is not None:
                await _written(file, kept)
            yield kept, file

    def _upload_of(self, tenant: str) -> asyncio.Semaphore:
        return self._uploads.setdefault(tenant, asyncio.Semaphore(self._limits.uploads))

    def _file(self) -> IO[bytes]:
        with full_disk_is_a_problem("what is sent"):
            return tempfile.TemporaryFile(dir=self._folder, buffering=0)


class Arriving:
    """The body of a request as it comes.

    Args:
        request: the request.
        most: the bytes that it may have.
        limit: the name of that limit.
        limits: what a client may take.

    Attributes:
        received: how many bytes have come.
    """

    def __init__(self, request: Request, most: int, limit: str, limits: FrontLimits) -> None:
        self._request, self._most, self._limit = request, most, limit
        self._limits = limits
        self._begun = asyncio.get_running_loop().time()
        self._counted = 0  # what had come when the time began
        self.received = 0

    def begin_again(self) -> None:
        """Counts the time from now on."""
        self._begun = asyncio.get_running_loop().time()
        self._counted = self.received

    async def pieces(self) -> AsyncIterator[bytes]:
        """Gives the pieces of the body.

        Raises:
            ProblemError: as of `Bodies.body_of`.
            ClientGoneError: as of `Bodies.body_of`.
        """
        more = True
        while more:
            try:
                async with asyncio.timeout_at(self._deadline()):
                    message = await self._request.receive()
            except TimeoutError:
                raise refused(408, "slow", "The body did not come in time.") from None
            if message["type"] != "http.request":
                raise ClientGoneError
            piece, more = message.get("body", b""), message.get("more_body", False)
            self.received += len(piece)
            if self.received > self._most:
                raise too_large(self._limit, self.received, self._most)
            yield piece

    def _deadline(self) -> float:
        """Until when the next piece has to be there."""
        earned = (self.received - self._counted) / self._limits.body_rate
        whole = self._begun + self._limits.body_seconds + earned
        return min(asyncio.get_running_loop().time() + self._limits.idle_seconds, whole)


class Budget:
    """An amount that is shared, first come, first served. Who asks for more than all gets all.

    Args:
        whole: how much there is.
    """

    def __init__(self, whole: float) -> None:
        self._whole, self._free = whole, whole
        self._waiting = deque[tuple[float, asyncio.Future[None]]]()

    @asynccontextmanager
    async def of(self, amount: float) -> AsyncIterator[None]:
        """Takes an amount for as long as the block lasts, once there is so much.

        Args:
            amount: how much.
        """
        taken = min(amount, self._whole)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((taken, turn))
        self._give()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._free += taken
            self._give()

    def _give(self) -> None:
        """Lets those begin for whom there is enough, in the order in which they came."""
        while self._waiting:
            taken, turn = self._waiting[0]
            if not turn.cancelled():  # else somebody who waits no more
                if taken > self._free:
                    break
                self._free -= taken
                turn.set_result(None)
            self._waiting.popleft()


def declared_length(request: Request) -> int | None:
    """Returns how long a request says that its body is, None if it does not.

    Raises:
        ProblemError: 400 if it says no number.
    """
    given = only(request, "content-length")
    if given is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", given):
        raise refused(400, "framing", "`Content-Length` is no number of bytes.")
    return int(given)


async def _written(file: IO[bytes], data: bytearray) -> None:
    with full_disk_is_a_problem("what is sent"):
        await run_in_threadpool(write_all, file.fileno(), bytes(data))


def _whole(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
