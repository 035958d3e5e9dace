"""On which addresses a server listens, and how it ends."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from insitu.graph.errors import LoadError, OptionError
from insitu.server.http.connections import Connections
from insitu.server.http.front import app_of
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.hosts import is_loopback
from insitu.server.http.listening import bound_sockets, check_exposure, fitting, serve, url_of
from insitu.server.settings import Settings
from tests.server.asking import JOB, client_of, fake, key, listening, quick
from tests.server.certificate import written
from tests.server.sockets import HEAD, POST, lines

pytestmark = pytest.mark.no_wire

PATH = Path("file")


def told(**given: Any) -> Settings:
    return replace(Settings((), Path()), **given)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.168.0.1", "gpu1", "fe80::1%lo", "1"])
@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, ["--keys", "--cert", "--behind-proxy"]),
        ({"keys": PATH}, ["--cert", "--behind-proxy"]),
        ({"behind_proxy": True}, ["--keys"]),
        ({"cert": PATH, "tls_key": PATH}, ["--keys"]),
        ({"keys": PATH, "cert": PATH, "tls_key": PATH}, None),
        ({"keys": PATH, "behind_proxy": True}, None),
    ],
)
def test_others_take_keys_and_tls(host: str, given: Any, missing: list[str] | None) -> None:
    settings = told(host=host, **given)
    if missing is None:
        check_exposure(settings)
        return
    with pytest.raises(OptionError, match="Other machines can reach") as raised:
        check_exposure(settings)
    found = [one for one in ("--keys", "--cert", "--behind-proxy") if one in str(raised.value)]
    assert found == missing


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "LOCALHOST"]
)
def test_this_machine_takes_neither(host: str) -> None:
    check_exposure(told(host=host))
    assert is_loopback(host)


def test_a_name_is_taken_for_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="Other machines"):
        check_exposure(told(host="localhost"), ["127.0.0.1", "10.0.0.1"])

    def resolved(*args: Any, **kwargs: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 0))]

    monkeypatch.setattr("socket.getaddrinfo", resolved)
    with pytest.raises(OptionError, match="Other machines"):
        bound_sockets(told(host="localhost"))


@pytest.mark.parametrize("given", [{"cert": PATH}, {"tls_key": PATH}])
def test_tls_takes_both_files(given: Any) -> None:
    with pytest.raises(OptionError, match="TLS takes both"):
        check_exposure(told(**given))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        with pytest.raises(OptionError, match="--port 0"):
            bound_sockets(told(port=one.getsockname()[1]))
    for port in (70_000, -1):
        with pytest.raises(OptionError, match="--port 0"):
            bound_sockets(told(port=port))
    with pytest.raises(OptionError, match="There can be no server at"):
        bound_sockets(told(host="no.such.host.invalid", keys=PATH, behind_proxy=True))


def test_all_addresses_of_a_name_have_one_port() -> None:
    sockets = bound_sockets(told(host="localhost"))
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert url_of(told(host="localhost"), sockets[0]).startswith("http://localhost:")
        assert url_of(told(host="::1"), sockets[0]).startswith("http://[::1]:")
        for_all = told(host="0.0.0.0", hosts=("gpu.lab",), cert=PATH)
        assert url_of(for_all, sockets[0]).startswith("https://gpu.lab:")
    finally:
        for one in sockets:
            one.close()


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[Any, ssl.SSLContext]]:
    cert, key = written(tmp_path)
    context = ssl.create_default_context(cafile=str(cert))
    yield fake(tmp_path, cert=cert, tls_key=key), context


def test_it_speaks_tls(tls: Any) -> None:
    served, context = tls

    async def ask() -> None:
        async with listening(served) as url, client_of(url, verify=context) as client:
            assert url.startswith("https://127.0.0.1:")
            origin = {"Origin": url}
            assert (await client.get("/v1/models", headers=origin)).status_code == 200
            answer = await client.post("/v1/jobs", headers=JOB, content=bytes(2**20))
            assert answer.status_code == 202 and len(served.submitted[0][1]) == 2**20
            async with lines(url) as (line,):  # no TLS
                await line.send(f"GET /healthz HTTP/1.1\r\n{HEAD}\r\n")
                assert b"200" not in await line.rest()

    asyncio.run(ask())


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01"])
def test_a_handshake_that_does_not_come_ends_the_connection(first: bytes, tls: Any) -> None:
    served, context = tls

    async def ask() -> bytes:
        limits = quick(head_seconds=0.2)
        async with listening(served, limits) as url, lines(url) as (line,):
            await line.send(first)
            return await line.rest()

    assert asyncio.run(asyncio.wait_for(ask(), 10)) == b""


def test_handshakes_that_do_not_come_stop_nobody(tls: Any) -> None:
    served, context = tls

    async def ask() -> None:
        limits = quick(connections_of_address=10)
        async with listening(served, limits) as url, lines(url, 20) as slow:
            for _ in range(5):
                async with client_of(url, verify=context) as client:
                    assert (await client.get("/v1/models")).status_code == 200
            await asyncio.sleep(0.01)
            assert 10 <= sum(line.has_ended for line in slow) <= 15

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("cert", "key"), [("none", "key.pem"), ("cert.pem", "cert.pem"), ("key.pem", "key.pem")]
)
def test_a_certificate_that_is_none_is_said(cert: str, key: str, tmp_path: Path) -> None:
    written(tmp_path)
    served = fake(tmp_path, cert=tmp_path / cert, tls_key=tmp_path / key)

    async def ask() -> None:
        async with listening(served):
            raise AssertionError

    with pytest.raises(LoadError, match="cannot be read"):
        asyncio.run(ask())


def test_a_server_that_stops_answers_those_who_wait(tmp_path: Path) -> None:
    async def ask() -> int:
        served = fake(tmp_path)
        there = listening(served)
        url = await there.__aenter__()
        async with lines(url, 3) as (line, idle, half):
            await line.send(f"{POST}Prefer: wait=60\r\nContent-Length: 3\r\n\r\njob")
            await half.send("GET /")
            while not served.submitted:
                await asyncio.sleep(0.005)
            await there.__aexit__(None, None, None)
            assert await idle.rest() == b""
            await half.rest()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/healthz")
            return await line.status()

    assert asyncio.run(asyncio.wait_for(ask(), 4)) == 202  # it was accepted


def test_what_takes_too_long_is_told_that_the_server_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("insitu.server.http.listening._STOP_SECONDS", 0.05)

    async def ask() -> bytes:
        served = fake(tmp_path)

        async def never(*args: Any) -> Any:
            served.submitted.append(("a", b"", None))  # pyright: ignore[reportArgumentType]
            await asyncio.sleep(60)

        monkeypatch.setattr(served, "submit", never)
        there = listening(served)
        url = await there.__aenter__()
        async with lines(url) as (line,):
            await line.send(f"{POST}Content-Length: 3\r\n\r\njob")
            while not served.submitted:
                await asyncio.sleep(0.005)
            await there.__aexit__(None, None, None)
            return await line.rest()

    got = asyncio.run(asyncio.wait_for(ask(), 10))
    assert got.startswith(b"HTTP/1.1 503 ") and b'"stopping"' in got and b"retry-after: 5" in got


def test_a_server_that_cannot_say_that_it_is_ready_ends(tmp_path: Path) -> None:
    served = fake(tmp_path)
    found: list[str] = []

    def ready(url: str) -> None:
        found.append(url)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        asyncio.run(serve(app_of(served), served.settings, ready))
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found[0]}/healthz", headers=key())


def test_limits_fit_into_the_files_that_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = FrontLimits()
    there, raised = [(1024, 1_000_000)], list[Any]()
    monkeypatch.setattr(resource, "getrlimit", lambda what: there[0])
    monkeypatch.setattr(resource, "setrlimit", lambda what, both: raised.append(both))
    assert fitting(limits) == limits and raised == [(2256, 1_000_000)]
    there[0] = (1024, 1024)
    found = fitting(limits)
    assert found.connections + found.streams <= 1024 - 256 and found.connections > 300
    there[0] = (100_000, 100_000)
    assert fitting(limits) == limits
    assert len(raised) == 2


def test_the_one_that_waits_longest_makes_room() -> None:
    closed = list[str]()

    def enter(address: str, name: str) -> Any:
        return connections.enter(address, lambda: closed.append(name))

    connections = Connections(quick(connections_of_address=2, connections=4))
    first, _ = enter("a", "1"), enter("a", "2")
    connections.works(first)
    connections.waits(first)
    assert enter("a", "3") and closed == ["2"]
    connections.works(first)
    assert enter("a", "4") and closed == ["2", "3"]
    assert enter("b", "5") and enter("b", "6") and len(connections) == 4
    assert enter("c", "7") and closed == ["2", "3", "4"]  # of who has most of them
    connections.leave(first)
    connections.leave(first)
    assert len(connections) == 3
    connections.end_waiting()
    assert closed == ["2", "3", "4", "5", "6", "7"]


def test_behind_a_proxy_addresses_do_not_count() -> None:
    limits = quick(connections_of_address=1, connections=2)
    connections = Connections(limits, by_address=False)
    places = [connections.enter("a", lambda: None) for _ in range(2)]
    assert all(places)
    for place in places:
        assert place is not None
        connections.works(place)
    assert connections.enter("a", lambda: None) is None
