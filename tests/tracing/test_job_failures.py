"""What fails in a job is told with its results, and takes nothing of what does not use it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu import (
    Job,
    LanguageModel,
    NotCachedError,
    NoValueError,
    Results,
    ShapeError,
)
from tests.conftest import tiny_gpt2

PROMPTS = [torch.tensor([ids]) for ids in ([5, 6, 7], [8, 9, 10, 11, 2], [3, 1])]
pytestmark = pytest.mark.no_wire


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(ids, use_cache=False).logits


def some_fail(model: LanguageModel, fails: Any) -> Job:
    with model.scan() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number == 1:
                    fails(model)
                model.lm_head.output.save(f"logits.{number}")
    return Job.from_bytes(tracer.job.to_bytes())


def of_unknown_size(model: LanguageModel) -> None:
    hidden = model.transformer.h[1].output[0]
    hidden[hidden > 1e9].reshape(7, 1111).save("bad")


def of_a_value(model: LanguageModel) -> None:
    torch.linalg.inv(model.transformer.h[1].output[0][0, :2, :2] * 0).save("bad")


@pytest.mark.parametrize("fails", [of_unknown_size, of_a_value])
def test_the_error_has_the_results_of_the_others(model: LanguageModel, fails: Any) -> None:
    job = some_fail(model, fails)
    with pytest.raises(Exception, match=r"test_job_failures\.py") as caught:
        model.run(job)
    results = caught.value.results
    assert list(results) == ["logits.0", "logits.2"]
    for number in (0, 2):
        expected = logits(model, PROMPTS[number])
        assert torch.allclose(results[f"logits.{number}"], expected, atol=1e-5)
    (failure,) = results.failed
    assert failure.error is caught.value
    assert (failure.block, [*failure.invocations]) == (0, [1])
    assert sorted(failure.names) == ["bad", "logits.1"]
    with pytest.raises(NotCachedError, match="its run has failed"):
        _ = results["logits.1"]
    assert "logits.1" not in results


def test_failures_may_be_told_without_raising_them_and_travel(model: LanguageModel) -> None:
    job = some_fail(model, of_a_value)
    results = model.run(job, raises=False)
    received = Results.from_bytes(results.to_bytes())
    assert list(received) == ["logits.0", "logits.2"]
    (there,), (here,) = received.failed, results.failed
    assert type(there.error) is type(here.error) and str(there.error) == str(here.error)
    assert there.names == here.names and there.invocations == here.invocations
    with pytest.raises(NotCachedError, match="its run has failed"):
        _ = received["bad"]


def test_later_blocks_run_unless_they_use_what_failed(model: LanguageModel) -> None:
    with model.session() as session:
        with model.trace() as first:
            with first.invoke(PROMPTS[0]):
                good = model.transformer.h[1].output[0][:, -1].save("good")
            with first.invoke(PROMPTS[1]):
                bad = model.transformer.h[1].output[0][:, -1]
                bad = bad @ torch.ones(16, 16)
        with model.trace() as second:
            with second.invoke(PROMPTS[0]):
                model.transformer.h[2].output[0][:, -1] = good
                model.lm_head.output.save("with the good")
            with second.invoke(PROMPTS[1]):
                model.transformer.h[2].output[0][:, -1] = bad
                model.lm_head.output.save("with the bad")
        with model.trace(PROMPTS[2]):
            model.lm_head.output.save("last")
    job = session.job
    whole = model.run(job)
    broken = Job(job.model, [_failing(job.blocks[0]), *job.blocks[1:]])
    results = model.run(broken, raises=False)
    assert sorted(results) == ["good", "last", "with the good"]
    for name in results:
        assert torch.allclose(results[name], whole[name], atol=1e-5)
    first_failure, second_failure = results.failed
    assert isinstance(first_failure.error, Exception) and first_failure.block == 0
    assert isinstance(second_failure.error, NoValueError) and second_failure.block == 1
    assert [*second_failure.names] == ["with the bad"]
    with pytest.raises(type(first_failure.error)):
        model.run(broken)


def _failing(block: Any) -> Any:
    """A block whose product has factors that do not fit."""
    for index, row in enumerate(block.graph.rows):
        if row[0].short == "matmul":
            args = (row[1][0], torch.ones(3, 3))
            block.graph.rows[index] = (row[0], args, *row[2:])
            return block
    raise AssertionError


def test_a_prompt_that_the_model_cannot_take_fails_alone(model: LanguageModel) -> None:
    with model.scan() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                model.lm_head.output.save(f"logits.{number}")
    job = tracer.job
    job.blocks[0].prompts[1].ids[0, 0] = 1000  # past the vocabulary
    results = model.run(job, raises=False)
    assert list(results) == ["logits.0", "logits.2"]
    (failure,) = results.failed
    assert [*failure.invocations] == [1]
    assert torch.allclose(results["logits.2"], logits(model, PROMPTS[2]), atol=1e-5)


def test_a_write_that_comes_too_late_fails_alone(model: LanguageModel) -> None:
    def late(model: LanguageModel) -> None:
        model.transformer.h[0].output[0][:] = model.transformer.h[2].output[0] * 1.0

    with pytest.raises(Exception, match="later in the run"), model.scan() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number == 1:
                    late(model)
                model.lm_head.output.save(f"logits.{number}")
    results = model.run(tracer.job, raises=False)
    assert list(results) == ["logits.0", "logits.2"]
    assert "later in the run" in str(results.failed[0].error)


def test_a_generation_gives_what_the_other_prompts_return(model: LanguageModel) -> None:
    with model.scan(generate=True, max_new_tokens=3) as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids) as invoker, invoker.step(1):
                if number == 1:
                    of_a_value(model)
                model.lm_head.output.save(f"logits.{number}")
    results = model.run(tracer.job, raises=False)
    (outputs,) = results.outputs
    assert outputs is not None and outputs.whole is None
    assert outputs.each[1] is None
    with torch.no_grad():
        expected = model.module.generate(
            PROMPTS[2], attention_mask=torch.ones_like(PROMPTS[2]), max_new_tokens=3,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert torch.equal(outputs.each[2], expected)
    with pytest.raises(NoValueError, match="has failed"):
        _ = results.output
    assert Results.from_bytes(results.to_bytes()).outputs[0].each[1] is None


def test_a_job_of_one_prompt_that_fails_has_no_results(model: LanguageModel) -> None:
    with model.scan(PROMPTS[0]) as tracer:
        of_unknown_size(model)
        model.lm_head.output.save("logits")
    with pytest.raises(ShapeError) as caught:
        model.run(tracer.job)
    assert not caught.value.results and len(caught.value.results.failed) == 1


def test_a_generation_of_which_everything_fails_has_outputs_without_values(
    model: LanguageModel,
) -> None:
    with model.scan(PROMPTS[0], generate=True, max_new_tokens=2) as tracer:
        of_a_value(model)
    results = model.run(tracer.job, raises=False)
    (outputs,) = results.outputs
    assert outputs is not None and (outputs.whole, [*outputs.each]) == (None, [None])
    with pytest.raises(NoValueError, match="has failed"):
        _ = results.output
