"""A client gives what a run here gives, at the user's own lines."""

from __future__ import annotations

import builtins
import os
import random
import re
import weakref
from typing import Any

import httpx
import msgspec
import pytest
import torch

from insitu import (
    InsituError,
    LanguageModel,
    MissingPackageError,
    NotCachedError,
    OptionError,
    RemoteError,
    ShapeError,
)
from insitu.graph.location import here
from insitu.remote import http_client
from insitu.remote.connection import Connection
from insitu.remote.key_files import write_key
from insitu.remote.protocol import PROTOCOL, JobEvent
from tests.conftest import tiny_gpt2
from tests.remote.conftest import Clock
from tests.remote.fake_server import (
    KEY,
    URL,
    FakeServer,
    problem,
)
from tests.remote.jobs import IDS, job_of, same

pytestmark = pytest.mark.no_wire


def test_a_run_gives_what_it_gives_here(model: LanguageModel, server: FakeServer) -> None:
    job = job_of(model)
    with server.connection() as connection:
        results = connection.run(job)
        assert same(results, model.run(job)) and results.about == model.run(job).about
    assert server.asked == ["POST /v1/jobs"]  # one request, since it asks to wait
    request = server.requests[0]
    assert request.headers["Prefer"] == "attended, wait=20"
    assert request.headers["Insitu-Protocol"] == str(PROTOCOL)
    assert request.headers["Accept-Encoding"] == "identity"
    assert request.url.params["priority"] == "interactive"


def test_events_are_told_and_the_results_are_fetched_after_them(
    model: LanguageModel, server: FakeServer
) -> None:
    job, told = job_of(model), list[JobEvent]()
    results = server.connection().run(job, told.append, model="tiny", priority="batch", seconds=2.5)
    assert same(results, model.run(job))
    assert [(event.number, event.kind) for event in told] == [
        (1, "state"), (2, "progress"), (3, "state"),
    ]  # fmt: skip
    request = server.requests[0]
    params = {"priority": "batch", "model": "tiny", "seconds": "2.5"}
    assert request.headers["Prefer"] == "attended" and dict(request.url.params) == params


def test_a_job_that_outlasts_the_wait_is_followed(model: LanguageModel, server: FakeServer) -> None:
    server.holds, job = True, job_of(model)

    def fault(request: httpx.Request) -> None:
        if request.url.path.endswith("/events"):
            server.finish("1".zfill(32))

    server.fault = fault
    assert same(server.connection().run(job), model.run(job))
    assert [asked.rpartition("/")[2] for asked in server.asked] == [
        "jobs", "events", "1".zfill(32), "result",
    ]  # fmt: skip


class TestErrors:
    def test_of_the_job_are_raised_at_the_users_own_line(
        self, model: LanguageModel, server: FakeServer
    ) -> None:
        with model.scan(IDS) as tracer:
            ids = model.lm_head.output[0, -1].argmax()
            model.transformer.h[1].output[0][0, ids].save("no")  # there is no such row
        with pytest.raises(InsituError) as local:
            model.run(tracer.job)
        for wait in (0, 20):
            with pytest.raises(InsituError) as caught:
                server.connection().run(tracer.job, wait=wait)
            assert type(caught.value) is type(local.value)
            assert str(caught.value) == str(local.value)
            location = caught.value.location
            assert location is not None and location.file == __file__
            assert location.text.endswith("# there is no such row")

    def test_of_one_invocation_come_with_what_there_is(
        self, model: LanguageModel, server: FakeServer
    ) -> None:
        with model.scan() as tracer:
            with tracer.invoke(IDS):
                good = model.lm_head.output[0, -1]
                good.save("good")
            with tracer.invoke(IDS):
                model.lm_head.output[0, model.lm_head.output[0, -1].argmax() + 90].save("bad")
        with pytest.raises(InsituError) as local:
            model.run(tracer.job)
        connection = server.connection()
        with pytest.raises(InsituError) as caught:
            connection.run(tracer.job)
        assert type(caught.value) is type(local.value) and str(caught.value) == str(local.value)
        assert torch.equal(caught.value.results["good"], local.value.results["good"])
        results = connection.run(tracer.job, raises=False)
        assert [one.names for one in results.failed] == [["bad"]]
        location = results.failed[0].error.location
        assert location is not None and location.file == __file__
        with pytest.raises(NotCachedError):
            results["bad"]

    def test_of_what_is_refused_are_the_same(
        self, model: LanguageModel, server: FakeServer
    ) -> None:
        job = job_of(LanguageModel(tiny_gpt2()))
        line = here(1)
        refused = problem("shape", 422, "Wrong.")
        server.fault = lambda _: refused
        with pytest.raises(ShapeError) as caught:
            server.connection().plan(job)
        location = caught.value.location
        assert location is not None and line.line < location.line < here(1).line

    def test_of_a_server_are_remote_errors(self, model: LanguageModel, server: FakeServer) -> None:
        server.fault = lambda _: problem("never_fits", 413, "It takes 9 bytes, and there are 8.")
        with pytest.raises(RemoteError, match="9 bytes, and there are 8") as caught:
            server.connection().run(job_of(model))
        assert (caught.value.code, caught.value.status) == ("never_fits", 413)
        assert len(server.asked) == 1

    def test_of_a_proxy_have_a_code(self, server: FakeServer, clock: Clock) -> None:
        codes: dict[int, str] = {}
        for status in (400, 401, 403, 404, 413, 418, 500, 502, 503, 504, 507):
            server.fault = lambda _, status=status: httpx.Response(status, html="<h1>No</h1>")
            with pytest.raises(RemoteError, match=str(status)) as caught:
                server.connection(timeout=1).models()
            codes[status] = caught.value.code
        assert codes[401] == "unauthorised" and codes[404] == "not_found"
        assert codes[502] == "unreachable" and codes[503] == "busy" and codes[418] == "protocol"

    def test_of_a_wrong_key_say_where_it_is_from(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        transport = server.transport()
        for key, said in (("wrong-key", "`key=`"), (None, "none")):
            with pytest.raises(RemoteError, match=said) as caught:
                Connection(URL, key, transport=transport).models()
            assert caught.value.code == "unauthorised" and "wrong-key" not in str(caught.value)
        write_key(9, "stale-key")
        with pytest.raises(RemoteError, match="server of yours"):
            Connection(URL, transport=transport).models()
        write_key(9, KEY)
        Connection(URL, transport=transport).models()
        monkeypatch.setenv("INSITU_KEY", "wrong-key")
        with pytest.raises(RemoteError, match="`INSITU_KEY`"):
            Connection(URL, transport=transport).models()


class TestQuestions:
    def test_plan_models_and_usage(self, model: LanguageModel, server: FakeServer) -> None:
        connection = server.connection()
        assert connection.plan(job_of(model), model="tiny").passes == 1
        assert server.jobs == {}
        assert [one.id for one in connection.models().models] == ["tiny"]
        assert connection.usage().limits == {"queued": 100}
        assert repr(connection) == f"Connection('{URL}')" and KEY not in repr(vars(connection))

    def test_options_that_are_none_are_refused_before_anything_is_sent(
        self, model: LanguageModel, server: FakeServer
    ) -> None:
        bad: list[dict[str, Any]] = [{"priority": "high"}, {"seconds": 0}, {"seconds": True}]
        bad += [{"seconds": float("inf")}, {"seconds": "60"}]
        for options in bad:
            with pytest.raises(OptionError):
                server.connection().submit(job_of(model), **options)
        with pytest.raises(OptionError, match="32 hexadecimal digits"):
            server.connection().job("../models")
        assert server.asked == []

    def test_httpx_is_asked_for_by_name(
        self, server: FakeServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "httpx":
                raise ImportError(name)
            return plain(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(MissingPackageError, match=re.escape("'insitu[remote]'")):
            server.connection().models()


def test_the_users_dice_are_not_touched(model: LanguageModel, server: FakeServer) -> None:

    before, of_torch = random.getstate(), torch.get_rng_state()
    failing = iter((503, 503))
    server.fault = lambda _: httpx.Response(s) if (s := next(failing, 0)) else None
    server.connection().models()
    assert random.getstate() == before and torch.equal(torch.get_rng_state(), of_torch)


def test_a_child_process_opens_its_own_sockets(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = server.connection()
    connection.models()
    before = connection._http._opened
    connection.models()
    assert connection._http._opened is before
    monkeypatch.setattr(http_client.os, "getpid", lambda: os.getppid())
    connection.models()
    assert connection._http._opened is not before
    connection.close()
    connection.models()


def test_a_connection_that_nobody_holds_is_closed(server: FakeServer) -> None:
    connection = server.connection()
    connection.models()
    client = connection._http._opened
    assert client is not None
    gone = weakref.ref(connection)
    del connection
    assert gone() is None and client.client.is_closed


def test_messages_of_the_protocol_stay_small(model: LanguageModel, server: FakeServer) -> None:
    server.connection().submit(job_of(model))
    status = msgspec.json.encode(server.jobs["1".zfill(32)].status)
    assert len(status) < 500
