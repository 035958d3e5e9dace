"""A client believes nothing that a server sends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from insitu import LanguageModel, RemoteError
from tests.remote.fake_server import FakeServer, Pieces, record
from tests.remote.jobs import job_of

pytestmark = pytest.mark.no_wire


def test_answers_of_other_kinds_are_none(model: LanguageModel, server: FakeServer) -> None:
    connection, job = server.connection(), job_of(model)
    strange: list[Any] = [b"", b"[]", b"{}", b"\xff", b"[" * 10**5, b'{"models": 3}', b"null"]
    for body in strange:
        server.fault = lambda _, body=body: httpx.Response(200, content=body)
        for ask in (
            connection.models,
            connection.usage,
            lambda: connection.plan(job),
            lambda: connection.run(job),
            lambda: connection.submit(job),
            lambda: connection.job("0" * 32),
        ):
            with pytest.raises(RemoteError, match="no server of Insitu") as caught:
                ask()
            assert caught.value.code == "protocol"


def test_results_that_are_none_are_refused(model: LanguageModel, server: FakeServer) -> None:
    job = job_of(model)
    headers = {"Content-Type": "application/vnd.insitu.results+safetensors"}
    for id, body in (("0" * 32, b"\xff" * 100), ("0" * 32, b""), ("../x", b""), ("", b"")):
        answer = httpx.Response(200, headers={**headers, "Insitu-Job": id}, content=body)
        server.fault = lambda _, answer=answer: answer
        with pytest.raises(RemoteError, match="results") as caught:
            server.connection().run(job)
        assert caught.value.code == "protocol"
    good = model.run(job).to_bytes()
    tags = {**headers, "Insitu-Job": "0" * 32, "ETag": f'"{"0" * 64}"'}
    server.fault = lambda _: httpx.Response(200, headers=tags, content=good)
    with pytest.raises(RemoteError, match="what their digest says"):
        server.connection().run(job)


def test_an_id_that_is_a_path_is_refused(model: LanguageModel, server: FakeServer) -> None:
    server.fault = lambda _: record({"id": "../models", "state": "queued", "model": "m"}, 202)
    with pytest.raises(RemoteError, match="without an id"):
        server.connection().submit(job_of(model))


def test_an_answer_without_an_end_is_not_read_to_its_end(
    model: LanguageModel, server: FakeServer
) -> None:
    sent = 0

    class Endless(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield b" " * 2**20

    for status, ask in (
        (200, lambda connection: connection.models()),
        (500, lambda connection: connection.models()),
        (500, lambda connection: connection.run(job_of(model))),
    ):
        sent = 0
        server.fault = lambda _, status=status: httpx.Response(status, stream=Endless())
        with pytest.raises(RemoteError, match="more than 16,777,216 bytes"):
            ask(server.connection())
        assert sent == 17


def test_results_that_are_too_large_are_not_taken(model: LanguageModel, server: FakeServer) -> None:
    job = job_of(model)
    for wait in (0, 20):
        with pytest.raises(RemoteError, match="more than 100 bytes"):
            server.connection(largest_result=100).run(job, wait=wait)


def test_an_answer_in_drops_is_given_up(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(10**6))

    class Drops(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            while True:
                yield b" "

    monkeypatch.setattr("insitu.remote.http_client.time.monotonic", lambda: next(seconds))
    server.fault = lambda _: httpx.Response(200, stream=Drops())
    with pytest.raises(RemoteError, match="does not come to an end"):
        server.connection(timeout=1).models()


def test_nothing_is_followed_unpacked_or_kept(server: FakeServer) -> None:
    moved = httpx.Response(307, headers={"Location": "http://evil.example/"})
    server.fault = lambda _: moved
    with pytest.raises(RemoteError, match=r"a redirect to 'http://evil\.example"):
        server.connection().models()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    server.fault = lambda _: httpx.Response(200, headers=headers, stream=Pieces(b"x", 1))
    with pytest.raises(RemoteError, match="a packed answer"):
        server.connection().models()
    connection = server.connection()
    server.fault = None
    answer = server.models(server.requests[0])
    answer.headers["Set-Cookie"] = "a=b"
    server.fault = lambda _: answer
    connection.models()
    connection.models()
    assert "Cookie" not in server.requests[-1].headers
