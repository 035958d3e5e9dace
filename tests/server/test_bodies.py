"""Bodies of requests: bounded while they come, in bytes, in time and in memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.types import Message

from insitu.remote.problems import Problem
from insitu.server.http.bodies import Bodies, Budget
from insitu.server.http.front import app_of
from insitu.server.http.refusals import ClientGoneError
from tests.server.asking import JOB, asked, bare, fake, key, quick
from tests.server.fake_served import BOB, FakeServed

pytestmark = pytest.mark.no_wire

BLOB = f"/v1/blobs/{'ab' * 32}"
CHUNK = 64 * 2**10


class Pieces:
    """A body that never ends by itself, and how much of it was taken."""

    def __init__(self, size: int, piece: int = CHUNK) -> None:
        self.left, self.taken, self._piece = size, 0, bytes(piece)

    async def __call__(self) -> Message:
        await asyncio.sleep(0)
        piece = self._piece[: self.left]
        self.left -= len(piece)
        self.taken += len(piece)
        return {"type": "http.request", "body": piece, "more_body": self.left > 0}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/plan", BLOB])
@pytest.mark.parametrize("length", ["1073741824", "", "9" * 18])
def test_a_gigabyte_is_refused_while_it_comes(path: str, length: str, tmp_path: Path) -> None:
    most = 4 * 2**20
    served = fake(tmp_path, longest_body=most, longest_blob=most)
    pieces = Pieces(2**30)
    type = JOB if path != BLOB else {}
    headers = {
        **type,
        **({"Content-Length": length} if length else {"Transfer-Encoding": "chunked"}),
    }
    method = "PUT" if path == BLOB else "POST"
    status, given, body = asyncio.run(bare(app_of(served), method, path, headers, pieces))
    problem = msgspec.json.decode(body, type=Problem)
    assert status == 413 and problem.code == "too_large" and problem.allowed == most
    assert problem.found > most and problem.limit in ("longest_body", "longest_blob")
    assert given["connection"] == "close"
    assert pieces.taken <= most + CHUNK
    assert served.submitted == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("POST", "/v1/jobs", {"authorization": ""}),
        ("POST", "/v1/jobs", {"authorization": "Bearer x"}),
        ("POST", "/v1/jobs", {"host": "evil.com"}),
        ("POST", "/v1/jobs", {"origin": "http://evil.com"}),
        ("POST", "/v1/jobs", {}),
        ("POST", "/v1/nothing", {}),
        ("PATCH", "/v1/jobs", {}),
        ("GET", "/healthz", {}),
        ("DELETE", "/v1/jobs/x", {}),
    ],
)
def test_what_is_refused_is_not_read(
    method: str, path: str, headers: dict[str, str], tmp_path: Path
) -> None:
    pieces = Pieces(2**30)
    given = {"Transfer-Encoding": "chunked", **headers}
    limits = quick(drained_bytes=2 * CHUNK)
    app = app_of(fake(tmp_path), limits)
    _, answer, body = asyncio.run(bare(app, method, path, given, pieces))
    assert answer["connection"] == "close" and pieces.taken <= 3 * CHUNK
    assert json.loads(body)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-length": "5"}, 202),
        ({"content-length": "4"}, 400),
        ({"content-length": "6"}, 400),
        ({"content-length": "-5"}, 400),
        ({"content-length": "5.0"}, 400),
        ({"content-length": "0x5"}, 400),
        ({"content-length": "\u0665"}, 400),
        ({"content-length": "9" * 30}, 400),
        ({"content-length": "5", "transfer-encoding": "chunked"}, 400),
        ({"transfer-encoding": "chunked"}, 202),
    ],
)
def test_a_body_is_as_long_as_it_says(headers: dict[str, str], status: int, tmp_path: Path) -> None:
    served = fake(tmp_path)
    given = {name: one.encode().decode("latin-1") for name, one in headers.items()}
    pieces = Pieces(5)
    found, _, body = asyncio.run(bare(app_of(served), "POST", "/v1/jobs", {**JOB, **given}, pieces))
    assert found == status and len(served.submitted) == (status == 202)
    assert status == 202 or msgspec.json.decode(body, type=Problem).code == "framing"


def test_a_client_that_goes_away_has_sent_nothing(tmp_path: Path) -> None:
    served = fake(tmp_path)
    messages: list[Message] = [
        {"type": "http.request", "body": bytes(2**20), "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def pieces() -> Message:
        return messages.pop(0)

    given = {**JOB, "Content-Length": str(2**21)}
    assert asyncio.run(bare(app_of(served), "POST", "/v1/jobs", given, pieces))[0] == 0
    assert served.submitted == [] and list(tmp_path.iterdir()) == []


def test_what_is_large_is_a_view_of_a_file_and_leaves_none(tmp_path: Path) -> None:
    kinds: list[tuple[str, bytes]] = []

    class Looking(FakeServed):
        async def put_blob(self, tenant: Any, digest: str, body: bytes | memoryview) -> None:
            kinds.append((type(body).__name__, bytes(body[-3:])))
            await super().put_blob(tenant, digest, body)

    served = Looking(tmp_path)
    limits = quick(body_memory=100_000)

    async def ask() -> None:
        async with asked(served, limits) as client:
            for size in (100_000, 300_000):
                data = bytes(size) + b"end"
                assert (await client.put(BLOB, content=data)).status_code == 204
                assert served.blobs["a"].popitem()[1] == size + 3
                answer = await client.post("/v1/jobs", headers=JOB, content=data)
                assert answer.status_code == 202
                assert served.submitted[-1][1] == data

    asyncio.run(ask())
    assert kinds == [("memoryview", b"end")] * 2 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_507(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    served = fake(tmp_path)
    for name in (
        "insitu.server.http.bodies.write_all",
        "insitu.server.http.bodies.tempfile.TemporaryFile",
    ):
        with monkeypatch.context() as patched:
            patched.setattr(name, lambda *args, **kwargs: full())

            async def ask() -> Any:
                async with asked(served, quick(body_memory=10)) as client:
                    return await client.put(BLOB, content=bytes(1000))

            answer = asyncio.run(ask())
            assert answer.status_code == 507 and answer.json()["code"] == "storage"
    assert not served.blobs["a"]


class Slowly:
    """A body in pieces that come when a test says so."""

    def __init__(self) -> None:
        self.queue = asyncio.Queue[Message]()

    async def __call__(self) -> Message:
        return await self.queue.get()

    def give(self, size: int, more: bool = True) -> None:
        self.queue.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})


def post(app: Any, pieces: Callable[[], Awaitable[Message]], secret: str = "") -> Any:
    given = {**JOB, "Transfer-Encoding": "chunked", **(key(secret) if secret else {})}
    given = {name.lower(): one for name, one in given.items()}
    return asyncio.ensure_future(bare(app, "POST", "/v1/jobs", given, pieces))


@pytest.mark.parametrize(
    "limits",
    [
        quick(idle_seconds=0.05, drained_seconds=0.01),
        quick(body_seconds=0.05, drained_seconds=0.01),
    ],
)
def test_a_body_that_does_not_come_is_408(limits: Any, tmp_path: Path) -> None:
    async def ask() -> Any:
        pieces = Slowly()
        pieces.give(10)
        return await post(app_of(fake(tmp_path), limits), pieces)

    status, headers, body = asyncio.run(ask())
    assert status == 408 and msgspec.json.decode(body, type=Problem).code == "slow"
    assert headers["connection"] == "close"


def test_a_body_that_drips_is_408(tmp_path: Path) -> None:
    taken = 0

    async def drip() -> Message:
        nonlocal taken
        await asyncio.sleep(0.002)
        taken += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    limits = quick(body_seconds=0.1, drained_seconds=0.01)
    status, _, _ = asyncio.run(_post_of(app_of(fake(tmp_path), limits), drip))
    assert status == 408 and 1 < taken < 100


async def _post_of(app: Any, pieces: Callable[[], Awaitable[Message]]) -> Any:
    return await post(app, pieces)


def test_a_large_body_that_comes_fast_enough_has_more_time(tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> Any:
        pieces = Slowly()
        task = post(app_of(served, quick(body_seconds=0.05, body_rate=1e6)), pieces)
        for _ in range(4):
            pieces.give(100_000)  # which is worth 0.1 seconds
            await asyncio.sleep(0.03)
        pieces.give(1, more=False)
        return await task

    assert asyncio.run(ask())[0] == 202 and len(served.submitted[0][1]) == 400_001


def test_large_bodies_of_one_tenant_do_not_hold_up_another(tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> list[str]:
        app = app_of(served, quick(uploads=2, body_memory=1000))
        slow = [Slowly() for _ in range(4)]
        tasks = [post(app, one) for one in slow]
        for one in slow:
            one.give(2000)
        await asyncio.sleep(0.05)
        other, small = Slowly(), Slowly()
        other.give(2000, more=False)
        small.give(10, more=False)
        for task in (post(app, other, BOB), post(app, small)):
            assert (await task)[0] == 202
        before = [tenant for tenant, _, _ in served.submitted]
        for one in slow:
            one.give(1, more=False)
        assert [(await task)[0] for task in tasks] == [202] * 4
        return before

    assert sorted(asyncio.run(ask())) == ["a", "b"]
    assert len(served.submitted) == 6


def test_too_many_requests_of_a_tenant_are_429(tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> None:
        app = app_of(served, quick(bodies=2))
        slow = [Slowly() for _ in range(2)]
        tasks = [post(app, one) for one in slow]
        await asyncio.sleep(0.01)
        last, other = Slowly(), Slowly()
        for one in (last, other):
            one.give(1, more=False)
        status, headers, body = await post(app, last)
        assert status == 429 and headers["retry-after"] == "1"
        assert msgspec.json.decode(body, type=Problem).allowed == 2
        assert (await post(app, other, BOB))[0] == 202
        for one in slow:
            one.give(1, more=False)
        assert [(await task)[0] for task in tasks] == [202, 202]
        last.give(1, more=False)
        assert (await post(app, last))[0] == 202

    asyncio.run(ask())


def test_too_many_that_wait_are_answered_at_once(tmp_path: Path) -> None:
    served = fake(tmp_path)

    async def ask() -> list[int]:
        async with asked(served, quick(waits=2)) as client:
            given = {**JOB, "Prefer": "wait=60"}
            tasks = [
                asyncio.create_task(client.post("/v1/jobs", headers=given, content=b"job"))
                for _ in range(3)
            ]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) == 1
            for number in range(1, 4):
                await served.move(f"{number:032x}", "done")
            return sorted([(await task).status_code for task in tasks])

    assert asyncio.run(ask()) == [200, 200, 202]


def test_a_budget_is_shared_in_order_and_never_passed() -> None:
    used, most, order = 0.0, 0.0, list[int]()

    async def take(budget: Budget, number: int, amount: float) -> None:
        nonlocal used, most
        async with budget.of(amount):
            order.append(number)
            used += min(amount, 10)
            most = max(most, used)
            await asyncio.sleep(0)
            used -= min(amount, 10)

    async def all_of() -> None:
        budget = Budget(10)
        amounts = [4, 4, 4, 99, 1, 10, 0, 3]
        tasks = [asyncio.create_task(take(budget, n, one)) for n, one in enumerate(amounts)]
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with budget.of(10):  # all of it is there again
            assert used == 0

    asyncio.run(asyncio.wait_for(all_of(), 5))
    assert most <= 10 and order == [0, 1, 2, 4, 5, 6, 7]


def test_who_is_gone_is_not_answered(tmp_path: Path) -> None:
    async def ask() -> None:
        bodies = Bodies(quick(), tmp_path)

        class Gone:
            headers: Any = type("", (), {"getlist": lambda self, name: []})()

            async def receive(self) -> Message:
                return {"type": "http.disconnect"}

        with pytest.raises(ClientGoneError):
            async with bodies.body_of(Gone(), "a", 10, "x"):  # pyright: ignore[reportArgumentType]
                raise AssertionError

    asyncio.run(ask())
