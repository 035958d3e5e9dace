"""What is lost on the way is sent again, and no job is run twice or for nobody."""

from __future__ import annotations

import threading

import httpx
import pytest

from insitu import (
    Cancel,
    CancelledError,
    LanguageModel,
    RemoteError,
)
from insitu.remote.protocol import JobEvent
from tests.remote.conftest import Clock
from tests.remote.fake_server import FakeServer, Pieces, problem
from tests.remote.jobs import job_of, same

pytestmark = pytest.mark.no_wire


def test_a_job_is_taken_once_however_often_its_answer_is_lost(
    model: LanguageModel, server: FakeServer, clock: Clock
) -> None:
    lost = 3

    def fault(request: httpx.Request) -> httpx.Response | None:
        nonlocal lost
        if request.method == "POST" and lost:
            lost -= 1
            server.submit(request)  # it arrives, and the answer does not
            raise httpx.ReadError("gone")
        return None

    server.fault = fault
    job = job_of(model)
    connection = server.connection()
    connection.models()
    assert same(connection.run(job), model.run(job))
    assert len(server.jobs) == 1 and server.asked.count("POST /v1/jobs") == 4
    assert len(clock.waited) == 3 and all(0 < one < 5 for one in clock.waited)
    connection.run(job)
    assert len(server.jobs) == 2  # the same job again is another one


def test_a_body_that_breaks_off_is_asked_for_again(
    model: LanguageModel, server: FakeServer
) -> None:
    broken = 2

    def fault(request: httpx.Request) -> httpx.Response | None:
        nonlocal broken
        if request.method == "POST" and broken:
            broken -= 1
            found = server.submit(request)
            stream = Pieces(found.content[:50], 10, breaks=True)
            return httpx.Response(found.status_code, headers=found.headers, stream=stream)
        return None

    server.fault = fault
    job = job_of(model)
    assert same(server.connection().run(job), model.run(job)) and len(server.jobs) == 1
    # Once it is lost, the results are fetched by themselves, where they can be taken up.
    assert server.requests[1].headers["Prefer"] == "attended"


def test_a_server_without_room_is_asked_again_when_it_says(
    server: FakeServer, clock: Clock
) -> None:
    answers = iter((429, 503))

    def fault(_: httpx.Request) -> httpx.Response | None:
        status = next(answers, None)
        if status is None:
            return None
        found = problem("busy", status, "Not now.")
        found.headers["Retry-After"] = "7"
        return found

    server.fault = fault
    server.connection().models()
    assert clock.waited == [7.0, 7.0] and len(server.asked) == 3


def test_nobody_waits_for_longer_than_he_would(
    model: LanguageModel, server: FakeServer, clock: Clock
) -> None:
    server.fault = lambda _: problem("quota", 429, "Tomorrow.", retry_after=3600.0)
    with pytest.raises(RemoteError, match="Tomorrow") as caught:
        server.connection().run(job_of(model))
    assert (caught.value.code, caught.value.retry_after) == ("quota", 3600.0)
    assert clock.waited == [] and len(server.asked) == 1
    server.fault = lambda _: httpx.Response(503, headers={"Retry-After": "-1e999"})
    with pytest.raises(RemoteError):
        server.connection(timeout=10).models()
    assert sum(clock.waited) <= 10


def test_an_address_where_nobody_is_is_told_soon(server: FakeServer, clock: Clock) -> None:
    def fault(_: httpx.Request) -> None:
        raise httpx.ConnectError("Connection refused")

    server.fault = fault
    with pytest.raises(RemoteError, match=r"cannot be reached: Connection refused\.") as caught:
        server.connection().models()
    assert caught.value.code == "unreachable" and len(server.asked) == 4
    assert sum(clock.waited) < 1


def test_a_server_that_has_answered_is_waited_for(server: FakeServer, clock: Clock) -> None:
    connection = server.connection()
    connection.models()
    gone = 12

    def fault(_: httpx.Request) -> None:
        nonlocal gone
        gone -= 1
        if gone:
            raise httpx.ConnectError("it is starting again")

    server.fault = fault
    connection.models()
    assert 10 < sum(clock.waited) < 60


def test_an_interrupt_while_it_is_sent_cancels_the_job(
    model: LanguageModel, server: FakeServer
) -> None:
    server.holds, interrupted = True, False

    def fault(request: httpx.Request) -> None:
        nonlocal interrupted
        if request.method == "POST" and not interrupted:
            interrupted = True
            server.submit(request)
            raise KeyboardInterrupt

    server.fault = fault
    with pytest.raises(KeyboardInterrupt):
        server.connection().run(job_of(model))
    (kept,) = server.jobs.values()
    assert kept.status.state == "cancelled"


def test_an_interrupt_while_it_runs_cancels_the_job(
    model: LanguageModel, server: FakeServer
) -> None:
    server.holds = True

    def fault(request: httpx.Request) -> None:
        if request.url.path.endswith("/events"):
            raise KeyboardInterrupt

    server.fault = fault
    with pytest.raises(KeyboardInterrupt):
        server.connection().run(job_of(model))
    (kept,) = server.jobs.values()
    assert kept.status.state == "cancelled"


def test_what_a_listener_raises_cancels_the_job(model: LanguageModel, server: FakeServer) -> None:
    server.holds = True

    def refuse(event: JobEvent) -> None:
        raise ZeroDivisionError(event.number)

    with pytest.raises(ZeroDivisionError):
        server.connection().run(job_of(model), refuse)
    (kept,) = server.jobs.values()
    assert kept.status.state == "cancelled"


def test_a_run_is_cancelled_from_another_thread(model: LanguageModel, server: FakeServer) -> None:
    server.holds, cancel, deleted = True, Cancel(), threading.Event()
    lost = iter([True])

    def fault(request: httpx.Request) -> None:
        if request.url.path.endswith("/events"):
            cancel.cancel()
            assert deleted.wait(10)
        if request.method == "DELETE":
            if next(lost, False):
                raise httpx.ReadError("gone")
            server.cancel(request, "1".zfill(32))
            deleted.set()

    server.fault = fault
    with pytest.raises(CancelledError, match="was cancelled"):
        server.connection().run(job_of(model), cancel=cancel)
    server.asked.clear()
    with pytest.raises(CancelledError, match="before it was sent"):
        server.connection().run(job_of(model), cancel=cancel)
    assert server.asked == []


def test_a_server_that_is_gone_is_told_of_while_it_is_tried_again(
    server: FakeServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    connection = server.connection()
    connection.models()
    for error in (httpx.ConnectError("Connection refused"), None):

        def fault(_: httpx.Request, error: Exception | None = error) -> httpx.Response:
            if error is not None:
                raise error
            return problem("busy", 503, "Not now.")

        server.fault = fault
        caplog.clear()
        with pytest.raises(RemoteError):
            connection.models()
        (told,) = caplog.records  # once, and not at the end
        what = "does not answer (Connection refused)" if error else "has no room (503)"
        assert what in told.getMessage() and connection.url in told.getMessage()
        assert told.levelname == "WARNING" and "again for 5" in told.getMessage()


def test_a_short_break_is_not_told_of(
    server: FakeServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    connection, lost = server.connection(), 2
    connection.models()

    def fault(_: httpx.Request) -> None:
        nonlocal lost
        lost -= 1
        if lost >= 0:
            raise httpx.ReadError("gone")

    server.fault = fault
    connection.models()
    assert lost == -1 and not caplog.records
