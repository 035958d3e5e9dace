"""A job that a server has: its results, its end, and how it is found again."""

from __future__ import annotations

import time

import httpx
import pytest
import torch

from insitu import (
    CancelledError,
    Job,
    LanguageModel,
    LimitError,
    RemoteError,
    ShapeError,
)
from insitu.remote import job_events
from insitu.remote.problems import Problem, problem_of
from insitu.remote.remote_job import RemoteJob
from tests.remote.fake_server import (
    URL,
    FakeServer,
    Pieces,
    problem,
    streamed,
)
from tests.remote.jobs import ID, STREAM, of_events

pytestmark = pytest.mark.no_wire


class TestResult:
    def test_is_fetched_once(
        self, server: FakeServer, queued: RemoteJob, model: LanguageModel, job: Job
    ) -> None:
        server.finish(ID)
        found = queued.result()
        assert torch.equal(found["logits"], model.run(job)["logits"])
        server.asked.clear()
        assert queued.result() is found and server.asked == []

    def test_has_a_time_limit(
        self, server: FakeServer, queued: RemoteJob, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = iter(range(10**6))
        monkeypatch.setattr(job_events.time, "monotonic", lambda: next(seconds))
        lively = httpx.Response(200, headers=STREAM, stream=Pieces(b": here\n\n" * 100, 8))
        server.fault = of_events(lambda *_: lively)
        with pytest.raises(RemoteError, match="not ended within 9 seconds") as caught:
            queued.result(timeout=9)
        assert caught.value.code == "timeout"
        monkeypatch.undo()
        server.fault = None
        server.finish(ID)

    def test_waits_no_longer_for_a_silent_server(
        self, server: FakeServer, queued: RemoteJob
    ) -> None:
        read: list[float] = []

        def silent(request: httpx.Request, _: int) -> httpx.Response:
            read.append(request.extensions["timeout"]["read"])
            time.sleep(0.02)
            raise httpx.ReadTimeout("")

        server.fault = of_events(silent)
        with pytest.raises(RemoteError, match="not ended within"):
            queued.result(timeout=0.01)
        assert read and 0 < read[0] <= 0.01
        server.fault = of_events(lambda request, _: read.append(1) or None)
        server.finish(ID)
        assert "logits" in queued.result()

    def test_that_breaks_off_is_taken_up_where_it_did(
        self, server: FakeServer, queued: RemoteJob, model: LanguageModel, job: Job
    ) -> None:
        server.finish(ID)
        kept, starts = server.jobs[ID].results, list[str]()

        def fault(request: httpx.Request) -> httpx.Response | None:
            if not request.url.path.endswith("/result"):
                return None
            starts.append(request.headers.get("Range", "bytes=0-"))
            found = server.result(request, ID)
            if len(starts) < 4:
                stream = Pieces(found.content[:100], 33, breaks=True)
                return httpx.Response(found.status_code, headers=found.headers, stream=stream)
            return None

        server.fault = fault
        assert torch.equal(queued.result()["logits"], model.run(job)["logits"])
        assert starts == [f"bytes={start}-" for start in (0, 100, 200, 300)]
        assert len(kept) > 400

    def test_begins_again_where_a_server_sends_no_parts(
        self, server: FakeServer, queued: RemoteJob, model: LanguageModel, job: Job
    ) -> None:
        server.finish(ID)
        kept, answers = server.jobs[ID].results, iter((200, 416, 200))

        def fault(request: httpx.Request) -> httpx.Response | None:
            if not request.url.path.endswith("/result"):
                return None
            status = next(answers, None)
            if status is None:
                return httpx.Response(200, stream=Pieces(kept, 100))
            if status == 416:
                return httpx.Response(416)
            return httpx.Response(200, stream=Pieces(kept[:50], 50, breaks=True))

        server.fault = fault
        assert torch.equal(queued.result()["logits"], model.run(job)["logits"])

    def test_is_what_its_digest_says(self, server: FakeServer, queued: RemoteJob) -> None:
        server.finish(ID)
        kept = server.jobs[ID]
        good = kept.results
        kept.results = good[:-1] + bytes([good[-1] ^ 1])
        with pytest.raises(RemoteError, match="what their digest says"):
            queued.result()
        kept.results = good
        ranges = {"Content-Range": "bytes 7-9/10"}
        for headers in (ranges, {}):
            broken = httpx.Response(200, stream=Pieces(good[:50], 50, breaks=True))
            other = httpx.Response(206, headers=headers, stream=Pieces(good[50:], 50))
            answers = iter((broken, other))
            server.fault = lambda request, answers=answers: (
                next(answers) if request.url.path.endswith("/result") else None
            )
            with pytest.raises(RemoteError, match="another part of the results"):
                queued.result()

    def test_that_has_expired_is_an_error(self, server: FakeServer, queued: RemoteJob) -> None:
        server.finish(ID)
        gone = problem("gone", 410, "They were deleted.")
        server.fault = lambda r: gone if r.url.path.endswith("/result") else None
        with pytest.raises(RemoteError, match="were deleted") as caught:
            queued.result()
        assert caught.value.code == "gone"

    def test_of_a_job_that_failed_is_its_error(self, server: FakeServer, queued: RemoteJob) -> None:
        why = problem_of(LimitError("Too long", limit="seconds", found=3, allowed=2))
        server.end(ID, "failed", problem=why)
        with pytest.raises(LimitError, match="Too long") as caught:
            queued.result()
        assert (caught.value.limit, caught.value.found) == ("seconds", 3)
        assert caught.value.location is not None and caught.value.location.file == __file__

    def test_of_a_job_that_killed_its_engine_is_a_remote_error(
        self, server: FakeServer, queued: RemoteJob
    ) -> None:
        server.end(ID, "failed", problem=Problem("engine_died", "", 500, "It died three times."))
        with pytest.raises(RemoteError, match="three times") as caught:
            queued.result()
        assert caught.value.code == "engine_died"

    @pytest.mark.parametrize("state", ["expired", "failed"])
    def test_of_a_job_that_ended_without_a_reason_says_how(
        self, server: FakeServer, queued: RemoteJob, state: str
    ) -> None:
        server.end(ID, state)
        with pytest.raises(RemoteError, match=f"has {state}") as caught:
            queued.result()
        assert caught.value.code == state

    def test_of_a_job_that_has_not_ended_after_all_is_refused(
        self, server: FakeServer, queued: RemoteJob
    ) -> None:
        server.jobs[ID].events.append(("state", {"state": "done"}))
        with pytest.raises(RemoteError, match="has not ended"):
            queued.result()


def test_a_job_is_cancelled(server: FakeServer, queued: RemoteJob) -> None:
    assert queued.status.state == "queued" and "queued" in repr(queued)
    assert queued.cancel().state == "cancelled" and queued.cancel().state == "cancelled"
    with pytest.raises(CancelledError):
        queued.result()
    assert repr(queued) == f"RemoteJob('{ID}' on {URL}: cancelled)"


def test_a_job_that_has_ended_is_not_asked_for_again(server: FakeServer, queued: RemoteJob) -> None:
    server.finish(ID)
    assert queued.status.state == "done"
    server.asked.clear()
    assert queued.status.state == "done" and server.asked == []


def test_the_status_of_another_job_is_refused(server: FakeServer, queued: RemoteJob) -> None:
    other = server.connection().submit(Job.from_bytes(server.jobs[ID].body))
    found = server.status(server.requests[-1], other.id)
    server.fault = lambda _: streamed(found)
    with pytest.raises(RemoteError, match="status of another job"):
        queued.status  # noqa: B018


def test_a_job_is_found_again(
    server: FakeServer, queued: RemoteJob, model: LanguageModel, job: Job
) -> None:
    again = server.connection().job(queued.id)
    assert again.id == queued.id and again.status.state == "queued"
    server.finish(ID)
    assert torch.equal(again.result()["logits"], model.run(job)["logits"])
    with pytest.raises(RemoteError, match="no such job"):
        server.connection().job("f" * 32)


def test_what_nobody_wrote_here_names_the_line_as_it_was_sent(
    server: FakeServer, model: LanguageModel
) -> None:
    with model.scan([[5, 6, 7]]) as tracer:
        at = model.lm_head.output[0, -1].argmax()
        model.lm_head.output[0, at + 90].save("no")  # a line of another process
    id = server.connection().submit(tracer.job).id
    with pytest.raises(ShapeError) as caught:
        server.connection().job(id).result()
    assert f'  File "{__file__.rpartition("/")[2]}", line' in str(caught.value)
    assert str(caught.value).endswith("# a line of another process")
