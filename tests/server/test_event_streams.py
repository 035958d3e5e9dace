"""Events of a job as a stream: in order, each once, through breaks, and for slow clients too."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from insitu.remote.protocol import JobEvent
from insitu.server.http.event_streams import written
from insitu.server.http.front import app_of
from tests.server.asking import asked, bare, client_of, fake, key, listening, quick
from tests.server.fake_served import BOB, FakeServed
from tests.server.sockets import HEAD, Line, lines

pytestmark = pytest.mark.no_wire

ID = f"{1:032x}"
PATH = f"/v1/jobs/{ID}/events"
FOLLOW = f"GET {PATH} HTTP/1.1\r\n{HEAD}\r\n"


def events_in(text: str) -> list[tuple[int, str, Any]]:
    """The events in a text, read as the standard has it."""
    found = []
    for block in text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


async def told(served: FakeServed, count: int = 3, end: bool = True) -> None:
    """A job with some events, and its end."""
    served.add()
    for number in range(count):
        await served.tell(ID, "token", invocation=0, step=number, ids=[number])
    if end:
        await served.move(ID, "done")


def test_an_event_is_written_on_lines_of_its_own() -> None:
    event = JobEvent(7, "value", {"name": "a\nb\r: \u2028é", "bytes": 3})
    text = written(event).decode()
    assert text.startswith("id: 7\nevent: value\ndata: ") and text.endswith("\n\n")
    assert text.count("\n") == 4 and "\r" not in text
    assert events_in(text) == [(7, "value", event.data)]


def test_events_come_in_order_and_end_with_the_job(tmp_path: Path) -> None:
    async def ask() -> Any:
        served = fake(tmp_path)
        await told(served)
        async with asked(served) as client:
            return await client.get(PATH)

    answer = asyncio.run(ask())
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    found = events_in(answer.text)
    assert [number for number, _, _ in found] == [1, 2, 3, 4]
    assert found[1] == (2, "token", {"invocation": 0, "step": 1, "ids": [1]})
    assert found[-1][1:] == ("state", {"state": "done", "attempt": 1})


@pytest.mark.parametrize(
    ("last", "numbers"),
    [("0", [1, 2, 3, 4]), ("2", [3, 4]), ("4", []), ("9", []), ("", [1, 2, 3, 4])],
)
def test_a_stream_goes_on_behind_an_event(last: str, numbers: list[int], tmp_path: Path) -> None:
    async def ask() -> Any:
        served = fake(tmp_path)
        await told(served)
        return await bare(app_of(served), "GET", PATH, {"Last-Event-ID": last})

    status, _, body = asyncio.run(ask())
    assert status == 200
    assert [number for number, _, _ in events_in(body.decode())] == numbers


@pytest.mark.parametrize("last", ["x", "-1", "1.0", "9" * 30, "1 2"])
def test_what_is_no_event_is_422(last: str, tmp_path: Path) -> None:
    async def ask() -> Any:
        served = fake(tmp_path)
        await told(served)
        return await bare(app_of(served), "GET", PATH, {"Last-Event-ID": last})

    assert asyncio.run(ask())[0] == 422


def test_a_question_for_the_head_follows_nothing(tmp_path: Path) -> None:
    async def ask() -> Any:
        served = fake(tmp_path)
        await told(served, end=False)
        async with listening(served) as url, client_of(url) as client:
            answer = await client.head(PATH)
            assert served.followed == 0
            return answer

    answer = asyncio.run(asyncio.wait_for(ask(), 10))
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event")


async def until(line: Line, end: bytes) -> bytes:
    return await asyncio.wait_for(line.reader.readuntil(end), 10)


def test_events_come_when_they_happen(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        async with listening(served) as url, lines(url) as (line,):
            await line.send(FOLLOW)
            assert await line.status() == 200
            for number in range(5):
                await served.tell(ID, "progress", done=number / 5)
                assert f"id: {number + 1}\n".encode() in await until(line, b"}\n\n")
            await served.move(ID, "cancelled")
            rest = await line.rest()
            assert b'"cancelled"' in rest and rest.endswith(b"0\r\n\r\n")
        assert served.followed == 0

    asyncio.run(ask())


def test_a_silent_stream_says_that_it_is_alive(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        async with listening(served, quick(heartbeat_seconds=0.02)) as url, lines(url) as (line,):
            await line.send(FOLLOW)
            assert await line.status() == 200
            for _ in range(3):
                assert b"\n: " in await until(line, b"\n\n")
            await served.tell(ID, "progress", done=0.5)
            assert b"id: 1\n" in await until(line, b"}\n\n")

    asyncio.run(ask())


def test_no_event_is_lost_or_doubled_through_breaks(tmp_path: Path) -> None:
    async def ask() -> list[int]:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        seen = list[int]()

        async def happen() -> None:
            for number in range(300):
                await served.tell(ID, "token", ids=[number])
                await asyncio.sleep(0.0005)
            await served.move(ID, "done")

        async with listening(served) as url:
            task = asyncio.create_task(happen())
            while len(seen) < 301:
                async with lines(url) as (line,):
                    await line.send(f"{FOLLOW[:-2]}Last-Event-ID: {len(seen)}\r\n\r\n")
                    assert await line.status() == 200
                    text = b""
                    while len(text) < 2000 and not line.has_ended:  # and then it breaks off
                        text += await line.reader.read(500)
                lines_of = [one for one in text.split(b"\r\n") if one.startswith(b"id")]
                found = events_in(b"".join(lines_of).decode())
                seen += [number for number, _, _ in found]
            await task
        assert served.followed == 0
        return seen

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == [*range(1, 302)]


def test_who_leaves_is_followed_no_more(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await told(served, 3, end=False)
        async with listening(served) as url:
            async with lines(url, 10) as several:
                for line in several:
                    await line.send(FOLLOW)
                    assert await line.status() == 200
                while served.followed < 10:
                    await asyncio.sleep(0.005)
            while served.followed:
                await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(ask(), 10))


async def _flood(served: FakeServed, count: int) -> None:
    for number in range(count):
        await served.tell(ID, "token", step=number, ids=[0] * 5000)
        if number % 5 == 0:
            await asyncio.sleep(0)


@pytest.mark.thorough
def test_a_client_that_does_not_read_is_closed_and_stops_nobody(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        limits = quick(queued_events=16, queue_seconds=1.0)
        async with listening(served, limits) as url:
            async with lines(url, buffer=65536) as (slow,), lines(url) as (fast,):
                for line in (slow, fast):
                    await line.send(FOLLOW)
                    assert await line.status() == 200
                reading = asyncio.create_task(fast.rest())
                await _flood(served, 2_000)
                while served.followed > 1:  # the slow one is closed
                    await asyncio.sleep(0.01)
                await served.move(ID, "done")
                assert b"id: 2001\n" in await reading
                got = await slow.rest()
                assert b"id: 1\n" in got and b"id: 2000\n" not in got
            last = max(int(one.split()[0]) for one in got.split(b"id: ")[1:-1])
            async with client_of(url) as client:  # it goes on where it was
                answer = await client.get(PATH, headers={"Last-Event-ID": str(last)})
            numbers = [number for number, _, _ in events_in(answer.text)]
            assert numbers == [*range(last + 1, 2_002)]

    asyncio.run(asyncio.wait_for(ask(), 60))


def test_a_slow_client_takes_no_memory(tmp_path: Path) -> None:
    async def ask() -> int:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        await _flood(served, 2_000)  # 20 MB as text
        limits = quick(queued_events=16, queue_seconds=60)
        async with listening(served, limits) as url, lines(url, 5, buffer=4096) as slow:
            tracemalloc.start()
            for line in slow:
                await line.send(FOLLOW)
                assert await line.status() == 200
            for _ in range(20):  # a byte now and then
                for line in slow:
                    await line.reader.read(1)
                await asyncio.sleep(0.02)
            assert served.followed == 5
            used = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            return used

    assert asyncio.run(asyncio.wait_for(ask(), 60)) < 8 * 2**20


def test_a_client_that_is_behind_gets_all_of_it(tmp_path: Path) -> None:
    async def ask() -> str:
        served = fake(tmp_path)
        await told(served, 3000)
        async with asked(served, quick(queued_events=2)) as client:
            return (await client.get(PATH)).text

    assert [number for number, _, _ in events_in(asyncio.run(ask()))] == [*range(1, 3002)]


def test_streams_are_counted_apart(tmp_path: Path) -> None:
    async def ask() -> None:
        served = fake(tmp_path)
        await told(served, 0, end=False)
        served.add("b")
        limits = quick(connections_of_address=3, streams_of_tenant=8, streams=9)
        async with listening(served, limits) as url:
            async with AsyncExitStack() as stack:

                async def status(text: str) -> int:
                    (line,) = await stack.enter_async_context(lines(url))
                    await line.send(text)
                    opened.append(line)
                    return await line.status()

                opened = list[Line]()
                assert [await status(FOLLOW) for _ in range(9)] == [200] * 8 + [429]
                other = FOLLOW.replace(key()["Authorization"], key(BOB)["Authorization"])
                other = other.replace(ID, f"{2:032x}")
                assert [await status(other) for _ in range(2)] == [200, 503]
                assert not any(line.has_ended for line in opened[:8])

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_what_fails_in_the_middle_does_not_seem_to_end(
    tmp_path: Path, no_fault_is_survived: Any
) -> None:
    class Failing(FakeServed):
        async def events(self, id: str, after: int) -> Any:
            yield self.told[id][0]
            raise RuntimeError("secret")

    async def ask() -> bytes:
        served = Failing(tmp_path)
        await told(served)
        async with listening(served) as url, lines(url) as (line,):
            await line.send(FOLLOW)
            return await line.rest()

    got = asyncio.run(ask())
    no_fault_is_survived.records.clear()  # that it is logged is as it should be
    assert got.startswith(b"HTTP/1.1 200 ") and not got.endswith(b"0\r\n\r\n")
    assert b"secret" not in got


def test_a_server_that_stops_ends_its_streams(tmp_path: Path) -> None:
    async def ask() -> bytes:
        served = fake(tmp_path)
        await told(served, 2, end=False)
        there = listening(served)
        url = await there.__aenter__()
        async with lines(url) as (line,):
            await line.send(FOLLOW)
            await until(line, b"id: 2\n")
            reading = asyncio.create_task(line.rest())
            await there.__aexit__(None, None, None)
            assert served.followed == 0
            return await reading

    assert asyncio.run(asyncio.wait_for(ask(), 4)).endswith(b"0\r\n\r\n")
