"""What a worker says of a job before it is accepted: of tensors sent apart, and of joined jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from insitu import Job, JobError, LanguageModel, join
from insitu.server.engines import admission
from insitu.server.engines.messages import Admitted, Check, Refused
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def looked_at(model: LanguageModel, path: Path, data: bytes, **given: Any) -> Admitted | Refused:
    path.write_bytes(data)
    return admission.check(model, Check(str(path), {}, {}, "ada", **given))


def steered(model: LanguageModel, count: int) -> Job:
    with model.scan([[1, 2, 3]]) as tracer:
        for number in range(count):
            model.transformer.h[0].output[0][:] += torch.full((16,), float(number))
        model.lm_head.output.save("logits")
    return tracer.job


def test_so_many_tensors_may_be_sent_apart(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MOST_BLOBS", 3)
    job = steered(model, 4)
    found = looked_at(model, tmp_path / "job", job.to_bytes(without=[*job.tensors]))
    assert isinstance(found, Refused) and found.problem.status == 413
    assert (found.problem.limit, found.problem.found) == ("blobs", len(job.tensors))
    found = looked_at(model, tmp_path / "job", job.to_bytes(without=[*job.tensors][:3]))
    assert isinstance(found, Refused) and found.problem.code == "missing_blobs"
    assert isinstance(looked_at(model, tmp_path / "job", job.to_bytes()), Admitted)


def test_jobs_that_cannot_be_joined_are_not_put_together(
    model: LanguageModel, tmp_path: Path
) -> None:
    one, other = steered(model, 1), steered(model, 2)
    first, second, joined = (
        looked_at(model, tmp_path / "job", job.to_bytes()) for job in (one, other, join([one, one]))
    )
    assert isinstance(first, Admitted) and isinstance(second, Admitted)
    assert isinstance(joined, Admitted) and joined.joins == ""
    assert first.joins and first.joins == second.joins
    jobs = [called(one, "model"), called(one, "another")]
    with pytest.raises(JobError):
        join(jobs)
    named = [looked_at(model, tmp_path / "job", job.to_bytes()) for job in jobs]
    assert len({job.joins for job in named if isinstance(job, Admitted)}) == 2


def called(job: Job, name: str) -> Job:
    return Job(structs.replace(job.model, name=name), job.blocks)
