"""Results over HTTP: whole, in parts, and not again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from insitu.remote.problems import Problem
from insitu.server.http.front import app_of
from tests.server.asking import answers, bare, done, fake, key, problem_in
from tests.server.fake_served import DIGEST, RESULTS, FakeServed

pytestmark = pytest.mark.no_wire


def result(
    served: FakeServed, headers: dict[str, str] | None = None, method: str = "GET"
) -> httpx.Response:
    return answers(served, method, f"/v1/jobs/{1:032x}/result", headers)


def test_results_are_sent_whole(tmp_path: Path) -> None:
    served = done(tmp_path, RESULTS * 1000)  # more than one piece
    answer = result(served)
    assert answer.status_code == 200 and answer.content == RESULTS * 1000
    assert answer.headers["content-length"] == str(len(RESULTS) * 1000)
    assert answer.headers["etag"] == f'"{DIGEST}"' and answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["cache-control"] == "private, no-cache"
    head = result(served, method="HEAD")
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == answer.headers["content-length"]


SIZE = len(RESULTS)
PARTS = [
    ("bytes=0-99", 0, 100),
    ("bytes=100-199", 100, 200),
    ("bytes=1000-", 1000, SIZE),
    ("bytes=-100", SIZE - 100, SIZE),
    ("bytes=0-0", 0, 1),
    (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    (f"bytes=0-{SIZE * 9}", 0, SIZE),
    (f"bytes=-{SIZE * 9}", 0, SIZE),
    ("BYTES = 5-6", 5, 7),
    (f"bytes={'0' * 30}5-{'9' * 5000}", 5, SIZE),
]


@pytest.mark.parametrize(("given", "begin", "end"), PARTS)
def test_parts_are_sent(given: str, begin: int, end: int, tmp_path: Path) -> None:
    answer = result(done(tmp_path), {"Range": given})
    assert answer.status_code == 206 and answer.content == RESULTS[begin:end]
    assert answer.headers["content-range"] == f"bytes {begin}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - begin)
    assert answer.headers["etag"] == f'"{DIGEST}"'


@pytest.mark.parametrize("given", [f"bytes={SIZE}-", f"bytes={'9' * 5000}-", "bytes=-0"])
def test_parts_that_are_not_there_are_416(given: str, tmp_path: Path) -> None:
    answer = result(done(tmp_path), {"Range": given})
    assert answer.status_code == 416 and problem_in(answer).code == "range"
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "given",
    [
        "bytes=0-1,5-6",
        "bytes=9-5",
        "bytes=-",
        "bytes=a-b",
        "lines=0-1",
        "bytes",
        "bytes=1-2-3",
        "0-99",
        "bytes=+1-2",
        "bytes=\u0663-",
        "",
    ],
)
def test_what_is_no_single_range_is_not_there(given: str, tmp_path: Path) -> None:
    served = done(tmp_path)

    async def ask() -> Any:
        headers = {"Range": given.encode().decode("latin-1") or " "}
        return await bare(app_of(served), "GET", f"/v1/jobs/{1:032x}/result", headers)

    status, _, body = asyncio.run(ask())
    assert status == 200 and body == RESULTS


def test_of_nothing_there_is_no_part(tmp_path: Path) -> None:
    served = done(tmp_path, b"")
    assert result(served, {"Range": "bytes=-5"}).status_code == 416
    assert result(served, {"Range": "bytes=0-"}).status_code == 416
    assert result(served).status_code == 200


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f'"{DIGEST}"', 206),
        ('"other"', 200),
        (f'W/"{DIGEST}"', 200),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 200),
    ],
)
def test_a_part_is_of_what_the_client_has(given: str, status: int, tmp_path: Path) -> None:
    answer = result(done(tmp_path), {"Range": "bytes=0-9", "If-Range": given})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("given", "known"),
    [
        (f'"{DIGEST}"', True),
        (f'W/"{DIGEST}"', True),
        ("*", True),
        (f'"a", "{DIGEST}"', True),
        ('"a,b"', False),
        (DIGEST, False),
        ("", False),
        (f'"x{DIGEST}"', False),
    ],
)
def test_what_is_known_is_not_sent_again(given: str, known: bool, tmp_path: Path) -> None:
    headers = {"If-None-Match": given, "Range": "bytes=0-9"}
    answer = result(done(tmp_path), headers)
    assert answer.status_code == (304 if known else 206)
    assert answer.headers["etag"] == f'"{DIGEST}"'
    skeleton = answers(fake(tmp_path), "GET", "/v1/models/insitu/eiffel/skeleton", headers)
    assert skeleton.status_code == (304 if known else 200)


@pytest.mark.parametrize(
    ("state", "problem", "status", "code"),
    [
        ("queued", None, 409, "not_done"),
        ("running", None, 409, "not_done"),
        ("cancelled", None, 409, "cancelled"),
        ("expired", None, 410, "gone"),
        ("failed", Problem("shape", "Shape", 422, "No."), 422, "shape"),
        ("failed", None, 500, "failed"),
        ("expired", Problem("late", "Late", 408, "No."), 408, "late"),
    ],
)
def test_without_results_there_is_a_problem(
    state: Any, problem: Any, status: int, code: str, tmp_path: Path
) -> None:
    served = fake(tmp_path)
    asyncio.run(served.move(served.add().id, state, problem))
    answer = result(served)
    assert answer.status_code == status and problem_in(answer).code == code


def test_results_whose_file_is_gone_are_410(tmp_path: Path) -> None:
    served = done(tmp_path)
    (tmp_path / DIGEST).unlink()
    answer = result(served)
    assert answer.status_code == 410 and problem_in(answer).code == "gone"


def test_results_are_sent_to_their_end_when_they_are_deleted(tmp_path: Path) -> None:
    served = done(tmp_path, RESULTS * 1000)

    async def ask() -> bytes:
        app = app_of(served)
        found = bytearray()

        async def take(message: Any) -> None:
            (tmp_path / DIGEST).unlink(missing_ok=True)
            found.extend(message.get("body", b""))

        async def nothing() -> Any:
            await asyncio.sleep(60)

        headers = [(b"host", b"127.0.0.1"), (b"authorization", key()["Authorization"].encode())]
        path = f"/v1/jobs/{1:032x}/result"
        scope = {
            "type": "http",
            "method": "GET",
            "path": path,
            "query_string": b"",
            "root_path": "",
        }
        await app({**scope, "headers": headers}, nothing, take)
        return bytes(found)

    assert asyncio.run(ask()) == RESULTS * 1000
