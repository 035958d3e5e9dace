"""What stands around all routes: for which hosts and from which sites requests may be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from insitu.server.http.front import app_of
from tests.server.asking import bare, client_of, fake, listening
from tests.server.fake_served import FakeServed

pytestmark = pytest.mark.no_wire

BLOB = f"/v1/blobs/{'ab' * 32}"
CHUNK = 64 * 2**10


def get(served: FakeServed, **headers: str) -> tuple[int, Any]:
    status, _, body = asyncio.run(bare(app_of(served), "GET", "/healthz", headers))
    return status, msgspec.json.decode(body)


# Hosts and sites.


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:1", 200),
        ("127.9.9.9:80", 200),
        ("localhost:8765", 200),
        ("LocalHost.", 200),
        ("[::1]:8765", 200),
        ("[::ffff:127.0.0.1]", 200),
        ("evil.com:8765", 421),
        ("127.0.0.1.evil.com", 421),
        ("localhost.evil.com", 421),
        ("192.168.0.1", 421),
        ("0.0.0.0", 421),
        ("127.0.0.1:8765:1", 400),
        ("127.0.0.1@evil.com", 400),
        ("a b", 400),
        ("[::1", 400),
        (" ", 400),
        ("", 400),
        ("x" * 300, 400),
    ],
)
def test_a_request_is_for_this_machine(host: str, status: int, tmp_path: Path) -> None:
    found, body = get(fake(tmp_path), host=host)
    assert found == status
    if status != 200:
        assert body["code"] == "host"


def test_names_that_were_named_are_this_servers(tmp_path: Path) -> None:
    served = fake(tmp_path, hosts=("gpu.lab.edu", "Gpu2"))
    for host in ("gpu.lab.edu", "GPU.lab.edu:443", "gpu2", "127.0.0.1"):
        assert get(served, host=host)[0] == 200
    assert get(served, host="lab.edu")[0] == 421
    found, body = get(served, host="other.lab.edu")
    assert found == 421 and "--name other.lab.edu" in body["detail"]


def test_a_server_for_others_is_reached_by_any_of_its_addresses(tmp_path: Path) -> None:
    served = fake(tmp_path, host="0.0.0.0", hosts=("gpu.lab.edu",))
    for host in ("192.168.0.1:8765", "[2001:db8::1]", "gpu.lab.edu", "127.0.0.1"):
        assert get(served, host=host)[0] == 200
    for host in ("evil.com", "localhost"):
        assert get(served, host=host)[0] == 421


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://127.0.0.1:8765", 200),
        ("HTTP://127.0.0.1:8765", 200),
        ("https://127.0.0.1:8765", 403),
        ("http://127.0.0.1", 403),
        ("http://127.0.0.1:8766", 403),
        ("http://localhost:8765", 403),
        ("http://evil.com", 403),
        ("null", 403),
        (" ", 403),
        ("127.0.0.1:8765", 403),
        ("http://127.0.0.1:8765@evil.com", 403),
        ("http://[::1", 403),
        ("http://127.0.0.1:99999", 403),
    ],
)
def test_pages_of_other_sites_are_refused(origin: str, status: int, tmp_path: Path) -> None:
    found, body = get(fake(tmp_path), origin=origin)
    assert found == status
    assert status == 200 or body["code"] == "origin"


def test_ports_of_schemes_need_not_be_written(tmp_path: Path) -> None:
    served = fake(tmp_path, hosts=("gpu.lab.edu",), behind_proxy=True)
    assert get(served, host="gpu.lab.edu", origin="https://gpu.lab.edu")[0] == 200
    assert get(served, host="gpu.lab.edu", origin="https://gpu.lab.edu:443")[0] == 200
    assert get(served, host="gpu.lab.edu:443", origin="https://gpu.lab.edu")[0] == 200
    assert get(served, host="gpu.lab.edu", origin="https://gpu.lab.edu:8443")[0] == 403


def test_a_preflight_allows_nothing(tmp_path: Path) -> None:
    headers = {"Origin": "https://evil.com", "Access-Control-Request-Method": "POST"}
    status, given, _ = asyncio.run(bare(app_of(fake(tmp_path)), "OPTIONS", "/v1/jobs", headers))
    assert status == 403
    assert not [name for name in given if name.startswith("access-control")]


def test_every_answer_has_the_headers(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        async with listening(served) as url, client_of(url) as client:
            for path in ("/healthz", "/v1/jobs", "/v1/nothing", "/v1/jobs?x=1"):
                answer = await client.get(path)
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["cache-control"] == "no-store"
                assert "server" not in answer.headers and "set-cookie" not in answer.headers

    asyncio.run(ask())


def test_websockets_are_closed(tmp_path: Path) -> None:
    sent: list[Any] = []

    async def ask() -> None:
        async def send(message: Any) -> None:
            sent.append(message)

        await app_of(fake(tmp_path))({"type": "websocket", "path": "/v1/jobs"}, None, send)  # pyright: ignore[reportArgumentType]

    asyncio.run(ask())
    assert [one["type"] for one in sent] == ["websocket.close"]
