"""Clients over sockets: slow ones, rude ones, and that others are served all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from insitu.remote.protocol import PROBLEM_TYPE
from tests.server.asking import JOB, client_of, fake, key, listening, quick
from tests.server.fake_served import ADMIN, DIGEST, FakeServed
from tests.server.sockets import HEAD, POST, lines

pytestmark = pytest.mark.no_wire

BLOB = f"/v1/blobs/{'ab' * 32}"
CHUNK = 64 * 2**10


async def _status(url: str, path: str = "/v1/models") -> int:
    """Asks over a connection of its own."""
    async with lines(url) as (line,):
        await line.send(f"GET {path} HTTP/1.1\r\n{HEAD}\r\n")
        return await line.status()


async def _is_served(url: str, count: int = 1) -> None:
    for _ in range(count):
        assert await _status(url) == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("what is this\r\n\r\n", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        (f"GET /{'x' * 17_000} HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (f"GET /healthz HTTP/1.1\r\n{HEAD}A: {'x' * 17_000}\r\n\r\n", 431),
        (f"GET /healthz HTTP/1.1\r\n{HEAD}" + "A: x\r\n" * 9_000 + "\r\n", 431),
        (f"GET /{'x' * 400_000}", 431),
        (f"GET / HTTP/1.1\r\n{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\n{HEAD}Transfer-Encoding: gzip\r\n\r\n", 501),
        (f"{POST}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (f"{POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (f"{POST}Content-Length: 1073741824\r\n\r\n", 413),
        ("GET /healthz HTTP/1.0\r\n\r\n", 400),
        ("GET http://127.0.0.1/healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 404),
        (f"GET /healthz HTTP/1.1\r\n{HEAD}Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", 200),
    ],
)
def test_what_is_no_request_is_a_problem(sent: str, status: int, tmp_path: Path) -> None:
    async def ask() -> None:
        async with listening(fake(tmp_path)) as url:
            async with lines(url) as (line,):
                await line.send(sent.encode("latin-1"))
                head = await line.head()
                assert int(head.split()[1]) == status
                if status != 200:
                    assert PROBLEM_TYPE.encode() in head
                    body = (await line.rest()) if b"close" in head.lower() else b""
                    assert not body or json.loads(body)["status"] == status
            await _is_served(url)

    asyncio.run(ask())


def test_a_gigabyte_over_a_socket_gets_its_answer(tmp_path: Path) -> None:
    def stream(sent: list[int]) -> Iterator[bytes]:
        for _ in range(2**30 // CHUNK):
            sent.append(CHUNK)
            yield bytes(CHUNK)

    def client(url: str) -> None:
        for given in ({}, {"Content-Length": str(2**30)}):
            sent: list[int] = []
            answer = httpx.post(
                f"{url}/v1/jobs", headers={**JOB, **key(), **given}, content=stream(sent)
            )
            assert answer.status_code == 413 and answer.json()["allowed"] == 2**20
            assert sum(sent) < 64 * 2**20  # what the system keeps of a connection

    async def ask() -> None:
        served = fake(tmp_path, longest_body=2**20)
        async with listening(served) as url:
            await asyncio.to_thread(client, url)
        assert served.submitted == []

    asyncio.run(ask())


def test_who_waits_for_permission_to_send_is_told_before(tmp_path: Path) -> None:
    async def ask() -> None:
        async with listening(fake(tmp_path, longest_body=100)) as url, lines(url, 2) as both:
            expects = "Expect: 100-continue\r\nContent-Length: "
            await both[0].send(f"{POST}{expects}101\r\n\r\n")
            assert await both[0].status() == 413
            await both[1].send(f"{POST}{expects}3\r\n\r\n")
            assert await both[1].status() == 100
            await both[1].send("job")
            assert await both[1].status() == 202

    asyncio.run(ask())


def test_requests_on_one_connection_are_answered_in_order(tmp_path: Path) -> None:
    async def ask() -> list[int]:
        async with listening(fake(tmp_path)) as url, lines(url) as (line,):
            paths = ["/healthz", "/v1/models", "/v1/nothing", "/healthz"]
            asks = [f"HEAD {path} HTTP/1.1\r\n{HEAD}\r\n" for path in paths]
            await line.send("".join(asks))
            found = [await line.status() for _ in paths]
            await line.send(asks[0][:10])
            await line.send(asks[0][10:])
            return [*found, await line.status()]

    assert asyncio.run(ask()) == [200, 200, 404, 200, 200]


@pytest.mark.parametrize("first", ["", "GET /heal", f"GET /healthz HTTP/1.1\r\n{HEAD}"])
def test_a_head_that_does_not_come_ends_the_connection(first: str, tmp_path: Path) -> None:
    async def ask() -> bytes:
        async with listening(fake(tmp_path), quick(head_seconds=0.1)) as url:
            async with lines(url) as (line,):
                await line.send(first)
                return await line.rest()

    assert asyncio.run(ask()).startswith(b"HTTP/1.1 408 ")


def test_a_second_head_that_does_not_come_ends_the_connection(tmp_path: Path) -> None:
    async def ask() -> bytes:
        async with listening(fake(tmp_path), quick(head_seconds=0.1)) as url:
            async with lines(url) as (line,):
                await line.send(f"HEAD /healthz HTTP/1.1\r\n{HEAD}\r\n")
                assert await line.status() == 200
                await asyncio.sleep(0.15)  # a connection may be idle for longer than that
                await line.send("GET /")
                return await line.rest()

    assert asyncio.run(ask()).startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_ends(tmp_path: Path) -> None:
    async def ask() -> bytes:
        async with listening(fake(tmp_path), quick(keep_alive_seconds=0)) as url:
            async with lines(url) as (line,):
                await line.send(f"HEAD /healthz HTTP/1.1\r\n{HEAD}\r\n")
                assert await line.status() == 200
                return await line.rest()

    assert asyncio.run(ask()) == b""


SLOW = {
    "nothing": "",
    "head": "GET / HTTP/1.1\r\nHost: ",
    "body": f"{POST}Content-Length: 9\r\n\r\n123",
    "idle": f"HEAD /healthz HTTP/1.1\r\n{HEAD}\r\n",
    "answer": f"GET /v1/jobs/{1:032x}/result HTTP/1.1\r\n{HEAD}\r\n",
}


async def _among_slow_ones(served: FakeServed, sent: str, count: int, limits: Any) -> None:
    """Is served while there are slow connections from the same address, and from another."""
    record = served.add()
    await served.move(record.id, "done", data=bytes(8 * 2**20))
    async with listening(served, limits) as url:
        async with lines(url, count, buffer=4096) as slow:
            for line in slow:
                await line.send(sent)
            if sent == SLOW["answer"]:  # while it is being read from the disk, nobody is slow
                while await _status(url) != 200:
                    await asyncio.sleep(0.02)
            await _is_served(url, 20)
            # No more of them were ended than had to be, one at a time.
            ended = sum(line.has_ended for line in slow)
            assert ended <= count - limits.connections_of_address + 5
            async with lines(url, 1, address="127.0.0.2") as (other,):
                await other.send(f"GET /v1/models HTTP/1.1\r\n{HEAD}\r\n")
                assert await other.status() == 200
        await _is_served(url)


@pytest.mark.parametrize("kind", SLOW)
def test_slow_connections_do_not_stop_others(kind: str, tmp_path: Path) -> None:
    limits = quick(connections_of_address=40, connections=60)
    asyncio.run(_among_slow_ones(fake(tmp_path), SLOW[kind], 50, limits))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SLOW)
def test_500_slow_connections_do_not_stop_others(kind: str, tmp_path: Path) -> None:
    asyncio.run(_among_slow_ones(fake(tmp_path), SLOW[kind], 500, quick()))


def test_connections_of_other_addresses_are_not_ended_for_one(tmp_path: Path) -> None:
    async def ask() -> None:
        limits = quick(connections_of_address=5, connections=12)
        async with listening(fake(tmp_path), limits) as url:
            async with lines(url, 5, address="127.0.0.2") as kept:
                async with lines(url, 30) as slow:
                    await _is_served(url, 3)
                    await asyncio.sleep(0.05)
                    assert not any(line.has_ended for line in kept)
                    assert sum(line.has_ended for line in slow) >= 25
                for line in kept:
                    await line.send(f"HEAD /healthz HTTP/1.1\r\n{HEAD}\r\n")
                    assert await line.status() == 200

    asyncio.run(ask())


def test_connections_that_work_are_not_ended_for_others(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        limits = quick(connections_of_address=3)
        async with listening(served, limits) as url, lines(url, 3) as busy:
            for line in busy:
                await line.send(f"{POST}Prefer: wait=50\r\nContent-Length: 3\r\n\r\njob")
            while len(served.submitted) < 3:
                await asyncio.sleep(0.005)
            async with lines(url) as (line,):
                answer = await line.rest()
                assert answer.startswith(b"HTTP/1.1 503 ") and b'"busy"' in answer
            for number in range(1, 4):
                await served.move(f"{number:032x}", "done")
            assert [await line.status() for line in busy] == [200] * 3

    asyncio.run(ask())


def test_results_that_nobody_takes_end_the_connection(tmp_path: Path) -> None:
    async def ask() -> int:
        served = fake(tmp_path)
        await served.move(served.add().id, "done", data=bytes(64 * 2**20))
        async with listening(served, quick(idle_seconds=0.2)) as url:
            async with lines(url, buffer=4096) as (line,):
                await line.send(SLOW["answer"])
                assert await line.status() == 200
                metrics = '{method="GET",route="job_result",status="200"} 1'
                async with client_of(url) as client:
                    while metrics not in (await client.get("/metrics", headers=key(ADMIN))).text:
                        await asyncio.sleep(0.02)
                return len(await line.rest())

    assert asyncio.run(ask()) < 32 * 2**20


def test_the_last_piece_that_nobody_takes_ends_the_connection(tmp_path: Path) -> None:
    async def ask() -> int:
        served = fake(tmp_path)
        await served.move(served.add().id, "done", data=bytes(4 * 2**20))
        limits = quick(idle_seconds=0.2, keep_alive_seconds=0)
        async with listening(served, limits) as url, lines(url, buffer=4096) as (line,):
            await line.send(SLOW["answer"].replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"))
            await asyncio.sleep(0.6)
            return len(await line.rest())

    assert asyncio.run(ask()) < 4 * 2**20


def test_a_client_that_waits_and_leaves_is_waited_for_no_more(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        async with listening(served) as url:
            async with lines(url) as (line,):
                await line.send(f"{POST}Prefer: wait=50\r\nContent-Length: 3\r\n\r\njob")
                while not served.submitted:
                    await asyncio.sleep(0.005)
            metrics = '{method="POST",route="jobs",status="gone"} 1'
            async with client_of(url) as client:
                while metrics not in (await client.get("/metrics", headers=key(ADMIN))).text:
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 10))


def test_logs_have_routes_and_no_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")

    async def ask() -> None:
        served = fake(tmp_path)
        await served.move(served.add().id, "done")
        async with listening(served) as url, client_of(url) as client:
            await client.get(f"/v1/jobs/{1:032x}/result?secret=1")
            await client.get(f"/v1/jobs/{1:032x}/result")
            await client.post("/v1/jobs", headers=JOB, content=b"my prompt")
            async with lines(url) as (line,):
                await line.send(f"nonsense {key()['Authorization']}\r\n\r\n")
                await line.rest()

    asyncio.run(ask())
    ours = [one for one in caplog.records if not one.name.startswith(("httpx", "httpcore"))]
    said = "\n".join(one.getMessage() for one in ours)
    assert "GET job_result 200" in said and "POST jobs 202" in said
    for secret in ("secret", "prompt", "insitu_ada", DIGEST, f"{1:032x}"):
        assert secret not in said


def test_what_fails_in_the_middle_of_an_answer_does_not_seem_whole(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await served.move(served.add().id, "done", data=bytes(2**25))
        async with listening(served) as url, lines(url, buffer=4096) as (line,):
            await line.send(SLOW["answer"])
            head = await line.head()
            assert str(2**25).encode() in head
            (tmp_path / DIGEST).write_bytes(b"short")  # the same file: it is shorter now
            assert len(await line.rest()) < 2**25

    asyncio.run(ask())
