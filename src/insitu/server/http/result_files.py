"""Results as answers: a file, or a part of one, sent piece by piece."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from insitu.remote.protocol import RESULTS_TYPE
from insitu.server.http.ranges import Part, UnsatisfiableError, is_known, is_the_same, part_of
from insitu.server.http.refusals import ClientGoneError, answer_of, refused
from insitu.server.storage.files import QUICK_BYTES

_PIECE = 128 * 2**10


async def results_answer(
    request: Request,
    path: Path,
    digest: str,
    headers: Mapping[str, str],
    counted: AbstractContextManager[None],
    *,
    parts: bool,
) -> Response:
    """Returns the results in a file as an answer: all of them, a part, or that they are known.

    Args:
        request: what was asked.
        path: the file.
        digest: the SHA-256 digest of the results.
        headers: further headers.
        counted: a block in which it is sent.
        parts: whether parts may be asked for, and whether a result that the client has is not sent.
            An answer to `POST` is always whole.

    Raises:
        ProblemError: 410 if the file is gone.
    """
    tag = f'"{digest}"'
    # They are the tenant's own: nobody between keeps them, and a client asks whether it may.
    given = {"ETag": tag, "Cache-Control": "private, no-cache", **headers}
    if parts and is_known(request.headers.get("if-none-match"), tag):
        return Response(None, 304, given)
    try:
        file = OpenFile(path)
    except FileNotFoundError:
        raise refused(410, "gone", "The results of this job are not kept any more.") from None
    try:
        part = None
        if parts:
            given["Accept-Ranges"] = "bytes"
            if request.method == "GET" and is_the_same(request.headers.get("if-range"), tag):
                part = part_of(request.headers.get("range"), file.size)
    except UnsatisfiableError as error:
        file.close()
        answer = answer_of(error.problem)
        answer.headers["Content-Range"] = str(error)
        return answer
    return FileAnswer(file, part, given, counted)


class OpenFile:
    """A file that is being sent. It is read to its end even if it is deleted meanwhile.

    Args:
        path: where it is.

    Attributes:
        size: its bytes.
    """

    def __init__(self, path: Path) -> None:
        self._number = -1  # in case that it cannot be opened
        self._number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._number).st_size

    def read(self, begin: int, count: int) -> bytes:
        """Returns some of its bytes."""
        return os.pread(self._number, count, begin)

    def close(self) -> None:
        """Closes it; twice is once."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1

    def __del__(self) -> None:
        self.close()


class FileAnswer(Response):
    """An answer with the content of a file.

    Args:
        file: the file.
        part: which part, None for all of it.
        headers: headers of the answer.
        counted: a block in which it is sent.
    """

    def __init__(
        self,
        file: OpenFile,
        part: Part | None,
        headers: Mapping[str, str],
        counted: AbstractContextManager[None],
    ) -> None:
        super().__init__(None, 200 if part is None else 206, dict(headers), RESULTS_TYPE)
        self._file, self._counted = file, counted
        self._part = part or Part(0, file.size, file.size)
        self.headers["Content-Length"] = str(len(self._part))
        if part is not None:
            self.headers["Content-Range"] = part.content_range

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, the next piece once the one before was taken."""
        start = {"status": self.status_code, "headers": self.raw_headers}
        try:
            with self._counted:
                await send({"type": "http.response.start", **start})
                await self._send_part(send, scope["method"] == "HEAD")
        finally:
            self._file.close()

    async def _send_part(self, send: Send, is_head: bool) -> None:
        begin, end = self._part.begin, self._part.end
        while begin < end and not is_head:
            if end - begin <= QUICK_BYTES:
                piece = self._file.read(begin, end - begin)
            else:
                piece = await run_in_threadpool(self._file.read, begin, min(_PIECE, end - begin))
            if not piece:  # it is shorter than it was: the answer is not to seem whole
                raise ClientGoneError
            begin += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": begin < end})
        if begin == self._part.begin:
            await send({"type": "http.response.body", "body": b""})
