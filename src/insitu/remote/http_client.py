"""Requests to a server: sent again where that is safe, and read no further than is sensible.

Every request can be sent twice without harm: jobs go with a key of their own, and all others give a
state to reach, not a change to make. Nothing follows a redirect, and nothing is unpacked.
"""

from __future__ import annotations

import io
import logging
import os
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import msgspec

from insitu.graph.errors import InsituError, MissingPackageError, OptionError, RemoteError, at_line
from insitu.graph.location import here
from insitu.remote.addresses import Address
from insitu.remote.answers import MOST_JSON, Answer, Asking
from insitu.remote.problems import LineOf, Problem, error_of
from insitu.remote.protocol import PROTOCOL
from insitu.remote.retrying import Retries

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

TRY_AGAIN = (429, 502, 503, 504)
"""What a server, or a proxy before it, answers when it has no room or is starting."""

_CODES = {
    401: "unauthorised", 403: "scope", 404: "not_found", 410: "gone", 413: "too_large",
    429: "busy", 502: "unreachable", 503: "busy", 504: "unreachable", 507: "storage",
}  # fmt: skip
"""Codes of answers that give no reason: those of proxies."""

_FIRST_ATTEMPTS = 4
"""How often a server is tried that has never answered: its address may be wrong."""

_SILENT = 1.0
"""After how many seconds of attempts somebody is told that a server does not answer."""

LARGEST_RESULT = 8 * 2**30
"""How many bytes of results a client takes unless told."""

_PIECE = 2**20
"""The bytes that are sent at once. Of more, httpx copies all that is left each time."""

Told = TypeVar("Told")


class TransportError(Exception):
    """A request, or its answer, that was lost on the way."""


@dataclass(slots=True)
class _Opened:
    """A client of httpx, and the process whose sockets it has."""

    client: httpx.Client
    process: int = field(default_factory=os.getpid)


class HttpClient:
    """Sends requests to one server.

    Args:
        address: where it is.
        key: the key, None for the one that `Address.key` finds.
        timeout: how many seconds a server may be silent, and how long to try again.
        largest_result: how many bytes of results it may send.
        transport: what sends requests in place of a network, as httpx has it.

    Attributes:
        url: where it is.
        timeout: as given.
        largest_result: as given.
    """

    def __init__(
        self,
        address: Address,
        key: str | None = None,
        timeout: float = 60.0,
        largest_result: int = LARGEST_RESULT,
        transport: Any = None,
    ) -> None:
        self.url, self.timeout, self.largest_result = address.url, timeout, largest_result
        self._address, self._key, self._transport = address, key, transport
        self._opened: _Opened | None = None
        self._has_answered = False

    def ask(
        self, asking: Asking, retries: Retries | None = None, then: Asking | None = None
    ) -> Answer:
        """Sends a request until it is answered, and returns the answer, of any status.

        Args:
            asking: the request.
            retries: how long to try; None for `timeout`.
            then: the request that is sent in its place once it was lost on the way; None for the
                same.

        Raises:
            RemoteError: if the server cannot be reached, or sends something that is no answer.
        """
        retries = retries or Retries(self.timeout)
        while True:
            try:
                answer = self._answer(asking)
            except TransportError as error:
                self.try_again(retries, error)
                asking = then or asking
                continue
            if answer.status in TRY_AGAIN:
                self._tell(retries, f"has no room ({answer.status})")
                if retries.another(self._wait_of(answer)):
                    continue
            return answer

    def try_again(self, retries: Retries, error: TransportError) -> None:
        """Waits before another attempt.

        Args:
            retries: how long to try.
            error: what has failed.

        Raises:
            RemoteError: if it was tried long enough.
        """
        hopeless = not self._has_answered and retries.made + 1 >= _FIRST_ATTEMPTS
        if hopeless:
            self.unreachable(str(error))
        self._tell(retries, f"does not answer ({str(error).rstrip('.')})")
        if not retries.another():
            self.unreachable(str(error))

    def asked_for(self, asking: Asking, kind: type[Told], line_of: LineOf | None = None) -> Told:
        """Sends a request, and returns the answer as a record.

        Args:
            asking: the request.
            kind: the class of the record.
            line_of: finds the client's own line.

        Raises:
            InsituError: what the server says in place of that.
        """
        return self.told(self.ask(asking), kind, line_of)

    def told(self, answer: Answer, kind: type[Told], line_of: LineOf | None = None) -> Told:
        """Returns what an answer says, as a record.

        Args:
            answer: the answer.
            kind: the class of the record.
            line_of: finds the client's own line.

        Raises:
            InsituError: what it says in place of that.
        """
        if not answer.is_good:
            raise self.error(answer, line_of)
        try:
            return msgspec.json.decode(answer.body, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise self.strange(f"what is no {kind.__name__}: {error}") from None

    def error(self, answer: Answer, line_of: LineOf | None = None) -> InsituError:
        """Returns the error that an answer is.

        Args:
            answer: the answer.
            line_of: finds the client's own line.
        """
        problem = answer.problem
        if problem is None:
            code = _CODES.get(answer.status, "protocol")
            detail = f"{self.url} has answered with {answer.status}, and without a reason."
            problem = Problem(code, code, answer.status, detail)
        if answer.status == 401:
            detail = f"{problem.detail} The key was {self._address.key(self._key)[1]}."
            problem = msgspec.structs.replace(problem, detail=detail)
        wait = self._wait_of(answer)
        problem = msgspec.structs.replace(problem, status=answer.status, retry_after=wait)
        return self.error_of(problem, line_of)

    def error_of(self, problem: Problem, line_of: LineOf | None = None) -> InsituError:
        """Returns the error that a problem is, at the line that runs where it is about none.

        Args:
            problem: the problem.
            line_of: finds the client's own line.
        """
        error = error_of(problem, line_of or (lambda _: None))
        return error if error.location is not None else at_line(error, here())

    def strange(self, what: str) -> RemoteError:
        """Returns the error for an answer that no server of Insitu gives.

        Args:
            what: what it was.
        """
        return RemoteError(
            f"{self.url} has sent {what}. It is no server of Insitu, or one of another version.",
            here(),
            code="protocol",
        )

    def unreachable(self, why: str) -> NoReturn:
        """Raises the error for a server that does not answer.

        Args:
            why: what failed.
        """
        raise RemoteError(
            f"{self.url} cannot be reached: {why.rstrip('.')}.", here(), code="unreachable"
        ) from None

    @contextmanager
    def streamed(self, asking: Asking) -> Generator[tuple[Answer, Iterator[bytes]]]:
        """Sends a request once, and gives the answer without its body, and the body in pieces.

        Args:
            asking: the request. How many bytes may come is for the caller to count.

        Raises:
            TransportError: if it is lost on the way, also while pieces are taken.
        """
        client = self._client()
        silence = self.timeout if asking.silence is None else asking.silence
        with _lost_on_the_way(silence):
            response = client.send(self._request(client, asking, silence), stream=True)
        try:
            self._has_answered = True
            answer = Answer(response.status_code, response.headers, b"")
            if response.is_redirect:
                raise self.strange(f"a redirect to {response.headers.get('location', '')!r:.200}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise self.strange("a packed answer, which was not asked for")
            yield answer, _pieces(response, silence)
        finally:
            response.close()

    def close(self) -> None:
        """Closes all connections. They are opened again where they are needed."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.client.close()

    def read(self, answer: Answer, pieces: Iterator[bytes], asking: Asking) -> Answer:
        """Returns an answer with its body.

        Args:
            answer: the answer, and so are the others as of `streamed`.
            pieces: its body.
            asking: the request.

        Raises:
            TransportError: if it is lost on the way.
            RemoteError: if it is longer than it may be.
        """
        most = asking.most if answer.is_good else min(asking.most, MOST_JSON)
        end = time.monotonic() + 4 * max(self.timeout, asking.silence or 0.0)
        body = io.BytesIO()
        for piece in pieces:
            body.write(piece)
            if body.tell() > most:
                raise self.strange(f"more than {most:,} bytes")
            if most <= MOST_JSON and time.monotonic() > end:  # it sends a byte now and then
                raise TransportError("it does not come to an end")
        return Answer(answer.status, answer.headers, body.getvalue())

    def _tell(self, retries: Retries, what: str) -> None:
        """Tells once why nothing happens. No line is at fault, so it is no warning."""
        if not retries.said and retries.waited > _SILENT:
            retries.said = True
            logger.warning("%s %s; tried again for %.0f seconds", self.url, what, retries.left)

    def _answer(self, asking: Asking) -> Answer:
        """Sends a request once, and reads the answer."""
        with self.streamed(asking) as (answer, pieces):
            return self.read(answer, pieces, asking)

    def _request(self, client: httpx.Client, asking: Asking, silence: float) -> httpx.Request:
        headers = {"Insitu-Protocol": str(PROTOCOL), "Accept-Encoding": "identity"}
        key = self._address.key(self._key)[0]
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        content: Any = asking.content
        if content is not None and len(content) > _PIECE:
            headers["Content-Length"] = str(len(content))
            content = _in_pieces(content)
        httpx = _httpx()
        try:
            return client.build_request(
                asking.method,
                f"{self.url}{asking.path}",
                params=dict(asking.params) or None,
                headers={**headers, **asking.headers},
                content=content,
                timeout=httpx.Timeout(self.timeout, read=silence),
            )
        except httpx.InvalidURL as error:
            raise OptionError(f"{self.url!r:.100} is no address: {error}.", here()) from None

    def _client(self) -> httpx.Client:
        """The client of httpx. A child process must not use the sockets of its parent."""
        opened = self._opened
        if opened is None or opened.process != os.getpid():
            httpx, is_here = _httpx(), self._address.is_here
            without_tls = is_here and self.url.startswith("http:")
            opened = _Opened(
                httpx.Client(
                    transport=self._transport,
                    # Reading the certificates of all authorities takes longer than a request.
                    verify=False if without_tls else httpx.create_ssl_context(),
                    follow_redirects=False,
                    trust_env=not is_here,  # a proxy is for other machines
                    limits=httpx.Limits(max_connections=None, keepalive_expiry=30.0),
                )
            )
            opened.client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))
            weakref.finalize(self, opened.client.close)
            self._opened = opened
        return opened.client

    def _wait_of(self, answer: Answer) -> float:
        problem = None if answer.is_good else answer.problem
        return max(answer.retry_after, 0.0 if problem is None else problem.retry_after)


def _in_pieces(content: bytes) -> Iterator[bytes]:
    for start in range(0, len(content), _PIECE):
        yield content[start : start + _PIECE]


def _pieces(response: httpx.Response, silence: float) -> Iterator[bytes]:
    with _lost_on_the_way(silence):
        yield from response.iter_raw()


@contextmanager
def _lost_on_the_way(silence: float) -> Generator[None]:
    """Says of httpx's many errors that a request was lost."""
    httpx = _httpx()
    try:
        yield
    except httpx.TimeoutException:
        raise TransportError(f"there was no answer for {silence:g} seconds") from None
    except httpx.TransportError as error:
        raise TransportError(str(error) or type(error).__name__) from None


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise MissingPackageError(
            "A server is asked with httpx, which is not installed: `pip install 'insitu[remote]'`.",
            here(),
        ) from None
    return httpx
