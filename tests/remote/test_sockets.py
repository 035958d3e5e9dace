"""A client and a server over sockets, which are closed."""

from __future__ import annotations

import time

import pytest
import torch

from insitu import (
    Job,
    LanguageModel,
    OptionError,
    RemoteError,
)
from insitu.remote.connection import Connection
from insitu.remote.key_files import write_key
from insitu.remote.remote_job import RemoteJob
from tests.remote.conftest import Clock
from tests.remote.fake_server import KEY, FakeServer, listening

pytestmark = pytest.mark.no_wire


@pytest.fixture(autouse=True)
def clocks(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr("insitu.remote.retrying.pause", lambda seconds: time.sleep(0.01))


def test_a_run_gets_through(server: FakeServer, model: LanguageModel, job: Job) -> None:
    cuts = {"POST /v1/jobs": [300], "/events": [20, 100], "/result": [200, 300]}

    def cut(asked: str) -> int | None:
        for name, left in cuts.items():
            if name in asked and left:
                return left.pop(0)
        return None

    told: list[int] = []
    with listening(server, cut) as url, Connection(url, KEY) as connection:
        connection.models()
        results = connection.run(job, lambda event: told.append(event.number), wait=0.001)
    assert torch.equal(results["logits"], model.run(job)["logits"])
    assert told == [1, 2, 3] and len(server.jobs) == 1
    assert {name: left for name, left in cuts.items() if left} == {}


def test_a_job_is_attached_to_with_the_key_of_ones_own_server(
    server: FakeServer,
    model: LanguageModel,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening(server, lambda _: None) as url:
        write_key(int(url.rpartition(":")[2]), KEY)
        monkeypatch.setenv("INSITU_REMOTE", url)
        with Connection() as connection:
            sent_job = connection.submit(job)
        attached = RemoteJob.attach(sent_job.id)
        assert torch.equal(attached.result()["logits"], model.run(job)["logits"])
        attached._http.close()
        with pytest.raises(RemoteError, match="unauthorised|key"):
            RemoteJob.attach(sent_job.id, url, "wrong-key")
    with pytest.raises(OptionError, match="32 hexadecimal digits"):
        RemoteJob.attach("../" + "0" * 29, url)
    monkeypatch.delenv("INSITU_REMOTE")
    with pytest.raises(OptionError, match="INSITU_REMOTE"):
        RemoteJob.attach(sent_job.id)


def test_large_tensors_arrive_whole(server: FakeServer, model: LanguageModel) -> None:
    vector = torch.randn(700_000, generator=torch.Generator().manual_seed(0))
    with model.scan([[5, 6, 7]]) as tracer:
        (model.lm_head.output[0, -1, :1] * vector).sum().save("sum")
    with listening(server, lambda _: None) as url, Connection(url, KEY) as connection:
        results = connection.run(tracer.job)
    assert torch.equal(results["sum"], model.run(tracer.job)["sum"])
    (blob,) = server.blobs.values()
    assert torch.equal(blob, vector)
    assert any(len(request.content) > 2_000_000 for request in server.requests)
