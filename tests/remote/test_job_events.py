"""Events come once and in their order, over connections that break."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import torch

from insitu import RemoteError
from insitu.remote.protocol import JobEvent
from insitu.remote.remote_job import RemoteJob
from tests.remote.conftest import Clock
from tests.remote.fake_server import (
    FakeServer,
    Pieces,
    problem,
    sent,
)
from tests.remote.jobs import ID, STREAM, of_events

pytestmark = pytest.mark.no_wire


def numbers(events: Iterator[JobEvent]) -> list[int]:
    return [event.number for event in events]


def test_events_come_once_and_in_order_wherever_the_stream_breaks(
    server: FakeServer, queued: RemoteJob
) -> None:
    kept = server.jobs[ID]
    kept.events += [("token", {"ids": [n], "step": n}) for n in range(5)]
    server.finish(ID)
    whole = sent(kept.events)
    for end in range(0, len(whole), 11):  # in the middle of an event, and between two

        def broken(_: httpx.Request, count: int, end: int = end) -> httpx.Response | None:
            if count:
                return None
            return httpx.Response(200, headers=STREAM, stream=Pieces(whole[:end], 5, True))

        server.fault = of_events(broken)
        found = [*queued.events()]
        assert numbers(iter(found)) == [*range(1, len(kept.events) + 1)]
        assert found[3].data == {"ids": [2], "step": 2} and found[3].kind == "token"
        last = whole[:end].count(b"\n\nid: ")  # what has arrived whole, but for the last
        resumed = server.requests[-1].headers.get("Last-Event-ID", "0")
        assert int(resumed) in (max(last - 1, 0), last)


def test_events_begin_after_the_one_that_is_known(server: FakeServer, queued: RemoteJob) -> None:
    server.finish(ID)
    assert numbers(queued.events()) == [1, 2, 3]
    assert numbers(queued.events(after=1)) == [2, 3]
    assert numbers(queued.events(after=3)) == []


def test_events_that_a_server_sends_twice_come_once(server: FakeServer, queued: RemoteJob) -> None:
    server.finish(ID)
    twice = sent(server.jobs[ID].events[:2]) + sent(server.jobs[ID].events)
    server.fault = of_events(
        lambda *_: httpx.Response(200, headers=STREAM, stream=Pieces(twice, 50))
    )
    assert numbers(queued.events()) == [1, 2, 3]


def test_events_of_kinds_that_come_later_are_passed_over(
    server: FakeServer, queued: RemoteJob
) -> None:
    server.jobs[ID].events += [("weather", {}), ("progress", {"done": 0.1})]
    server.finish(ID)
    assert numbers(queued.events()) == [1, 3, 4, 5]


def test_events_go_on_when_the_server_starts_again(
    server: FakeServer, queued: RemoteJob, clock: Clock
) -> None:
    def gone(request: httpx.Request) -> httpx.Response | None:
        if len(clock.waited) < 6:
            raise httpx.ConnectError("refused")
        if server.jobs[ID].status.state == "queued":
            server.finish(ID)
        return None

    server.fault = gone
    assert numbers(queued.events()) == [1, 2, 3] and len(clock.waited) >= 6


def test_events_end_where_a_proxy_lets_none_through(
    server: FakeServer, queued: RemoteJob, clock: Clock
) -> None:
    """What has become of the job is known all the same."""
    server.fault = of_events(lambda *_: httpx.Response(504))
    server.finish(ID)
    assert torch.is_tensor(queued.result()["logits"]) and sum(clock.waited) <= 60


def test_events_of_a_stream_that_ends_at_once_are_asked_for_for_a_while(
    server: FakeServer, queued: RemoteJob, clock: Clock
) -> None:
    server.fault = of_events(lambda *_: httpx.Response(200, headers=STREAM, stream=Pieces(b"", 1)))
    with pytest.raises(RemoteError, match="events broke off") as caught:
        list(queued.events())
    assert caught.value.code == "unreachable" and 10 < sum(clock.waited) <= 60


def test_events_that_are_none_are_refused(server: FakeServer, queued: RemoteJob) -> None:
    bad = [
        b"id: 1\nevent: state\ndata: nothing\n\n",
        b"id: 1\nevent: state\ndata: []\n\n",
        b"id: 1\nevent: state\ndata: " + b"[" * 10**5 + b"\n\n",
        b"id: x\nevent: state\ndata: {}\n\n",
        b"id: -1\nevent: state\ndata: {}\n\n",
        "id: ²\nevent: state\ndata: {}\n\n".encode(),
        b"id: " + b"9" * 5000 + b"\nevent: state\ndata: {}\n\n",
        b"event: state\ndata: {}\n\n",
        b"data: " + b"x" * 2**21,
    ]
    for data in bad:
        server.fault = of_events(
            lambda *_, data=data: httpx.Response(200, headers=STREAM, stream=Pieces(data, 999))
        )
        with pytest.raises(RemoteError, match="no server of Insitu") as caught:
            list(queued.events())
        assert caught.value.code == "protocol"
    server.fault = of_events(lambda *_: httpx.Response(200, html="<p>"))
    with pytest.raises(RemoteError, match="'text/html' in place of events"):
        list(queued.events())


def test_events_whose_state_is_no_word_do_not_end_it(server: FakeServer, queued: RemoteJob) -> None:
    server.jobs[ID].events += [("state", {"state": ["done"]}), ("state", {"state": "lost"})]
    server.finish(ID)
    assert numbers(queued.events()) == [1, 2, 3, 4, 5]


def test_events_of_a_job_that_is_gone_are_an_error(server: FakeServer, queued: RemoteJob) -> None:
    server.fault = lambda _: problem("not_found", 404, "There is no such job.")
    with pytest.raises(RemoteError, match="no such job") as caught:
        list(queued.events())
    assert (caught.value.code, caught.value.status) == ("not_found", 404)
