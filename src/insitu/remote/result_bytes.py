"""The bytes of results: taken up where they broke off, counted, and compared with their digest."""

from __future__ import annotations

import hashlib
import io
import re

from insitu.graph.errors import RemoteError
from insitu.graph.location import here
from insitu.remote.answers import Answer, Asking
from insitu.remote.http_client import TRY_AGAIN, HttpClient, TransportError
from insitu.remote.retrying import Retries

_RANGE = re.compile(r"bytes (\d{1,18})-")


def result_bytes(http: HttpClient, id: str, digest: str | None) -> bytes:
    """Returns the bytes of the results of a job.

    Args:
        http: sends requests.
        id: the job, which is done.
        digest: the SHA-256 digest that they have, None if that is not known.

    Raises:
        RemoteError: if they are there no longer, are too large, or are not what their digest says.
        InsituError: what the job has failed with.
    """
    retries, body, tag, most = Retries(http.timeout), io.BytesIO(), digest or "", 0
    while True:
        start = body.tell()
        headers = {"Range": f"bytes={start}-", "If-Range": f'"{tag}"'} if start and tag else {}
        asking = Asking("GET", f"/v1/jobs/{id}/result", headers=headers)
        try:
            with http.streamed(asking) as (answer, pieces):
                if answer.status in TRY_AGAIN:
                    raise TransportError(f"the server has answered with {answer.status}")
                if answer.status == 416 or (start and answer.status == 200):
                    body = io.BytesIO()  # from the beginning: there was nothing left, or no part
                if answer.status == 416:
                    raise TransportError("its results broke off")
                if not answer.is_good:
                    raise http.error(http.read(answer, pieces, asking))
                if answer.status == 206 and _start(answer) != body.tell():
                    raise http.strange("another part of the results")
                tag = tag or answer.digest
                check_size(http, body.tell() + answer.length)
                for piece in pieces:
                    body.write(piece)
                    check_size(http, body.tell())
                    if body.tell() > most:  # else it is what had come before
                        most = body.tell()
                        retries.went_well()
        except TransportError as error:
            http.try_again(retries, error)
            continue
        data = body.getvalue()
        check_digest(http, data, tag)
        return data


def check_size(http: HttpClient, size: int) -> None:
    """Raises if results are larger than a client takes.

    Args:
        http: says how large they may be.
        size: how many bytes there are, as far as that is known.
    """
    if size > http.largest_result:
        raise RemoteError(
            f"The results have more than {http.largest_result:,} bytes: save less, such as "
            "`x[:, -1]` in place of `x`, or give `largest_result=`.",
            here(),
            code="too_large",
        )


def check_digest(http: HttpClient, data: bytes, digest: str) -> None:
    """Raises if bytes are not those of a digest.

    Args:
        http: where they are from.
        data: the bytes.
        digest: the digest, "" if it is not known.
    """
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise http.strange("results that are not what their digest says")


def _start(answer: Answer) -> int:
    found = _RANGE.match(answer.headers.get("content-range", ""))
    return int(found[1]) if found else -1
