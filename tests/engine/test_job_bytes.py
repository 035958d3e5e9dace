"""What of a job's bytes a server changes, or looks at, before it is read."""

import pytest
import torch

from insitu import Job, LanguageModel, WireError
from insitu.engine.unread_jobs import absent_from, without_source


def job_with(value: torch.Tensor) -> Job:
    model = LanguageModel("insitu/eiffel")
    with model.scan(torch.arange(4)[None]) as tracer:
        (model.transformer.h[0].output[0] + value).save("sum")  # the text of this line
    return tracer.job


def test_texts_of_lines_can_be_left_out() -> None:
    job = job_with(torch.ones(128))
    data = job.to_bytes()
    assert b"the text of this line" in data
    stripped = without_source(data)
    assert b"the text of this line" not in stripped
    found, whole = Job.from_bytes(stripped), Job.from_bytes(data)
    lines = [row[5][0].line for row in whole.blocks[0].graph.rows]
    assert [row[5][0].line for row in found.blocks[0].graph.rows] == lines
    assert {row[5][0].text for row in found.blocks[0].graph.rows} == {""}
    assert found.saves == whole.saves and found.tensors.keys() == whole.tensors.keys()


def test_tensors_that_did_not_come_with_it_are_named() -> None:
    job = job_with(torch.ones(128))
    (wanted,) = [digest for digest, one in job.tensors.items() if one.shape == (128,)]
    assert absent_from(job.to_bytes()) == []
    assert absent_from(job.to_bytes(without=[wanted])) == [wanted]
    for read in (absent_from, without_source):
        with pytest.raises(WireError):
            read(b"no job")


def test_leaves_have_numbers_of_their_own() -> None:
    one, other = torch.zeros(128, requires_grad=True), torch.zeros(128, requires_grad=True)
    job = job_with(one)
    with pytest.raises(WireError, match="requires grad"):
        job.to_bytes()
    assert [leaf is one for leaf in job.trained] == [True]
    model = LanguageModel("insitu/eiffel")
    with model.trace(torch.arange(4)[None]) as tracer:
        model.transformer.h[0].output[0][:] += one
        model.transformer.h[0].output[0][:] += other
        model.logits[0, -1].log_softmax(-1)[5].backward()
    received = Job.from_bytes(tracer.job.to_bytes(trains=True))
    assert len(received.leaves) == 2 and received.leaves[0] is not received.leaves[1]
    results = LanguageModel("insitu/eiffel").run(received)
    assert len(results) == 0
    for leaf, own in zip(received.leaves, (one.grad, other.grad), strict=True):
        assert leaf.grad is not None and own is not None
        torch.testing.assert_close(leaf.grad, own, rtol=1e-5, atol=1e-5)
