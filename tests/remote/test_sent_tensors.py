"""Large tensors are sent once, by their digests."""

from __future__ import annotations

import pytest
import torch

from insitu import LanguageModel, RemoteError
from insitu.remote.protocol import INLINE_BYTES
from tests.remote.fake_server import FakeServer, problem
from tests.remote.jobs import IDS, job_of, same

pytestmark = pytest.mark.no_wire


VECTOR = torch.randn(INLINE_BYTES // 4 + 16, generator=torch.Generator().manual_seed(0))


def test_large_ones_are_sent_once(model: LanguageModel, server: FakeServer) -> None:
    job, connection = job_of(model, VECTOR), server.connection()
    connection.plan(job)
    assert same(connection.run(job), model.run(job))
    blob = f"/v1/blobs/{next(iter(server.blobs))}"
    assert server.asked == [f"HEAD {blob}", f"PUT {blob}", "POST /v1/plan", "POST /v1/jobs"]
    assert len(server.requests[-1].content) < 10_000
    assert torch.equal(next(iter(server.blobs.values())), VECTOR)
    server.asked.clear()
    server.connection().run(job)
    assert server.asked == [f"HEAD {blob}", "POST /v1/jobs"]


def test_small_ones_go_with_the_job(model: LanguageModel, server: FakeServer) -> None:
    job = job_of(model, VECTOR[:64].clone())
    assert same(server.connection().run(job), model.run(job))
    assert server.asked == ["POST /v1/jobs"]


def test_those_that_a_server_has_lost_are_sent_again_once(
    model: LanguageModel, server: FakeServer
) -> None:
    job, connection = job_of(model, VECTOR), server.connection()
    connection.run(job)
    server.blobs.clear()
    server.asked.clear()
    assert same(connection.run(job), model.run(job))
    assert [asked.split()[0] for asked in server.asked] == ["POST", "HEAD", "PUT", "POST"]
    server.asked.clear()
    forgetful = problem("missing_blobs", 409, "Send them.", digests=tuple(server.blobs))
    server.fault = lambda request: forgetful if request.method == "POST" else None
    with pytest.raises(RemoteError, match="Send them") as caught:
        connection.run(job)
    assert caught.value.code == "missing_blobs" and len(server.asked) == 3


def test_a_server_gets_no_tensors_that_are_not_of_the_job(
    model: LanguageModel, server: FakeServer
) -> None:
    greedy = problem("missing_blobs", 409, "Send them.", digests=("../secret", "0" * 64))
    server.fault = lambda request: greedy if request.method == "POST" else None
    with pytest.raises(RemoteError, match="Send them"):
        server.connection().run(job_of(model, VECTOR))
    assert [asked.split()[0] for asked in server.asked] == ["HEAD", "PUT", "POST"]


def test_dtypes_that_safetensors_lacks_go_with_the_job(
    model: LanguageModel, server: FakeServer
) -> None:
    turning = torch.polar(torch.ones_like(VECTOR), VECTOR)
    with model.scan(IDS) as tracer:
        ones = torch.view_as_real(turning)[0, 0]
        (model.lm_head.output[0, -1, 0] * turning).real.save("real")
    assert ones.ndim == 0 and max(map(torch.numel, tracer.job.tensors.values())) > INLINE_BYTES / 8
    results = server.connection().run(tracer.job)
    assert same(results, model.run(tracer.job)) and server.blobs == {}
