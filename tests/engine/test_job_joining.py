"""Jobs that are joined give each what it gives alone, and see nothing of each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace

from insitu import (
    Job,
    JobError,
    LanguageModel,
    NotCachedError,
    Results,
    ShapeError,
    WireError,
    join,
    split,
)
from insitu.graph.node import Earlier
from insitu.graph.operations import READ
from tests.conftest import tiny_gpt2, tiny_llama
from tests.thinning import sampled

PROMPTS = [torch.tensor([ids]) for ids in ([5, 6, 7], [8, 9, 10, 11, 2], [3, 1], [4, 4, 9, 20])]
pytestmark = pytest.mark.no_wire


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def traced(model: LanguageModel, *prompts: torch.Tensor, **options: Any) -> Job:
    """A write and two saves, of which one has a name, for each prompt."""
    with model.scan(**options) as tracer:
        for number, ids in enumerate(prompts):
            with tracer.invoke(ids):
                model.transformer.h[1].output[0][:] += float(number) + float(ids[0, 0])
                model.lm_head.output.save()
                model.transformer.h[2].output[0][:, -1].save(f"hidden.{number}")
    return tracer.job


def generated(model: LanguageModel, steps: int, *prompts: torch.Tensor, **options: Any) -> Job:
    with model.scan(generate=True, max_new_tokens=steps, **options) as tracer:
        for ids in prompts:
            with tracer.invoke(ids) as invoker, invoker.every_step():
                model.transformer.h[1].output[0][:, -1] += float(ids[0, 0])
                model.lm_head.output[:, -1].save(f"logits.{ids[0, 0]}")
    return tracer.job


def failing(model: LanguageModel, ids: torch.Tensor) -> Job:
    with model.scan(ids) as tracer:
        hidden = model.transformer.h[1].output[0]
        hidden[hidden > 1e9].reshape(7, 1111).save("bad")
        model.lm_head.output.save("logits")
    return tracer.job


def assert_same(one: Results, other: Results) -> None:
    assert list(one) == list(other) and one.about == other.about
    for name, value in other.items():
        mine = one[name]
        for a, b in zip(mine, value, strict=True) if isinstance(value, list) else [(mine, value)]:
            assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-5), name
    for mine, theirs in zip(one.outputs, other.outputs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine.whole, theirs.whole)
            assert all(map(torch.equal, mine.each, theirs.each))


def test_each_job_has_what_it_has_alone(model: LanguageModel) -> None:
    jobs = [
        traced(model, PROMPTS[0]),
        generated(model, 4, PROMPTS[1], PROMPTS[2], do_sample=False),
        traced(model, PROMPTS[3], PROMPTS[1]),
        generated(model, 2, PROMPTS[0], do_sample=False),
        traced(model, PROMPTS[2], share_prefixes=False),
    ]
    joined = join(jobs)
    assert [len(block.prompts) for block in joined.blocks] == [3, 3, 1]
    there = Job.from_bytes(joined.to_bytes())
    assert there.to_bytes() == joined.to_bytes()
    results = Results.from_bytes(model.run(there, raises=False).to_bytes())
    for job, own in zip(jobs, split(there, results), strict=True):
        assert_same(own, model.run(job))
        assert not own.failed


@pytest.mark.thorough
def test_joined_jobs_share_passes(model: LanguageModel) -> None:
    joined = join([traced(model, ids) for ids in PROMPTS])
    assert model.check(joined).passes == 1
    joined = join([generated(model, 2 + n, ids) for n, ids in enumerate(PROMPTS)])
    assert model.check(joined).passes == 1


@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_llama], [tiny_gpt2]))
def test_a_generation_goes_on_as_long_as_its_own_job_says(make: Any) -> None:
    model = LanguageModel(make())
    jobs = []
    for steps, ids in zip((1, 5, 3), PROMPTS, strict=False):
        with model.scan(generate=True, max_new_tokens=steps, eos_token_id=None) as tracer:
            for at in range(2):
                with tracer.invoke(ids + at) as invoker, invoker.every_step():
                    model.lm_head.output[:, -1].save(f"logits.{at}")
        jobs.append(tracer.job)
    for job, own in zip(jobs, split(joined := join(jobs), model.run(joined)), strict=True):
        assert_same(own, model.run(job))


def test_one_that_fails_fails_alone_with_its_own_line(model: LanguageModel) -> None:
    jobs = [traced(model, PROMPTS[0]), failing(model, PROMPTS[1]), traced(model, PROMPTS[2])]
    joined = join(jobs)
    parts = split(joined, model.run(joined, raises=False))
    with pytest.raises(ShapeError) as alone:
        model.run(jobs[1])
    (failure,) = parts[1].failed
    assert str(failure.error) == str(alone.value)
    assert (failure.block, [*failure.invocations]) == (0, [0])
    assert sorted(failure.names) == ["bad", "logits"]
    with pytest.raises(NotCachedError, match="its run has failed"):
        _ = parts[1]["logits"]
    for at in (0, 2):
        assert_same(parts[at], model.run(jobs[at]))
    with pytest.raises(ShapeError) as caught:
        model.run(joined)
    assert_same(split(joined, caught.value.results)[2], model.run(jobs[2]))


def test_sessions_are_joined_block_by_block(model: LanguageModel) -> None:
    def session(ids: torch.Tensor, fails: bool = False) -> Job:
        with model.session() as made:
            with model.trace(ids):
                value = model.transformer.h[1].output[0][:, -1]
                value = value @ torch.linalg.inv(torch.eye(16) @ torch.eye(16))
                if fails:
                    value = torch.linalg.inv((value[0, 0] * 0).expand(16, 16))[:1]
                value.save("value")
            with model.generate(ids, max_new_tokens=2):
                model.transformer.h[2].output[0][:, -1] = value
                model.lm_head.output[:, -1].save("logits")
        return made.job

    jobs = [session(PROMPTS[0]), session(PROMPTS[1]), traced(model, PROMPTS[2])]
    joined = join(jobs)
    assert [len(block.prompts) for block in joined.blocks] == [3, 2]
    for job, own in zip(jobs, split(joined, model.run(joined)), strict=True):
        assert_same(own, model.run(job))


@pytest.mark.thorough
def test_a_generation_that_stops_leaves_the_others_theirs(model: LanguageModel) -> None:
    with model.scan(generate=True, max_new_tokens=4) as tracer, tracer.invoke(PROMPTS[0]):
        model.transformer.h[1].output[0].save("hidden")
        model.transformer.h[1].stop()
    jobs = [tracer.job, generated(model, 3, PROMPTS[1])]
    joined = join(jobs)
    parts = split(joined, model.run(joined))
    assert_same(parts[1], model.run(jobs[1]))
    alone = model.run(jobs[0])
    assert torch.allclose(parts[0]["hidden"], alone["hidden"], atol=1e-5)


def test_jobs_for_other_models_are_refused_by_what_differs(model: LanguageModel) -> None:
    other = LanguageModel(tiny_llama())
    with other.scan(PROMPTS[0]) as tracer:
        other.lm_head.output.save()
    with pytest.raises(JobError, match="its class is LlamaForCausalLM"):
        join([traced(model, PROMPTS[0]), tracer.job])
    with pytest.raises(JobError, match="no job to join"):
        join([])
    joined = join([traced(model, PROMPTS[0])])
    with pytest.raises(JobError, match="made of several jobs"):
        join([joined, joined])
    with pytest.raises(JobError, match="not made of several"):
        split(traced(model, PROMPTS[0]), model.run(joined))
    with pytest.raises(JobError, match="not the results of this job"):
        split(joined, Results({}, {}))


def test_no_job_reaches_the_invocations_of_another(model: LanguageModel) -> None:
    victim = traced(model, PROMPTS[0])
    for number in (1, -1):
        job = traced(model, PROMPTS[1])
        rows = job.blocks[0].graph.rows
        for index, row in enumerate(rows):
            if row[0] is READ:
                rows[index] = (row[0], (number, *row[1][1:]), *row[2:])
        with pytest.raises(JobError, match=f"Job 1 names invocation {number} of its block 0"):
            join([victim, job])
    job = traced(model, PROMPTS[1])
    job.blocks[0].graph.scopes = [(1, 0, 2)]
    with pytest.raises(JobError, match="names invocation 1"):
        join([job, victim])
    with model.session() as session:
        with model.trace(PROMPTS[0]):
            value = model.transformer.h[1].output[0].sum()
        with model.trace(PROMPTS[1]):
            (model.lm_head.output * value).save()
    job = session.job
    rows = job.blocks[1].graph.rows
    for index, row in enumerate(rows):
        if row[4]:
            args = tuple(Earlier(1, 0) if type(arg) is Earlier else arg for arg in row[1])
            rows[index] = (row[0], args, *row[2:])
    with pytest.raises(JobError, match="no block before it saves"):
        join([victim, job])


def test_parts_that_are_not_there_are_not_read(model: LanguageModel) -> None:
    joined = join([traced(model, PROMPTS[0]), traced(model, PROMPTS[1])])
    (share,) = joined.parts[1].shares
    for wrong in ({"block": 1}, {"first": 2}, {"size": 1000}, {"count": 2}):
        part = replace(joined.parts[1], shares=[replace(share, **wrong)])
        data = Job(joined.model, joined.blocks, [joined.parts[0], part]).to_bytes()
        with pytest.raises(WireError, match="that are not there"):
            Job.from_bytes(data)
    part = replace(joined.parts[1], names={"other": "mine"})
    with pytest.raises(WireError, match="that is not saved"):
        Job.from_bytes(Job(joined.model, joined.blocks, [part]).to_bytes())


def test_long_names_are_kept_apart(model: LanguageModel) -> None:
    with model.scan(PROMPTS[0]) as tracer:
        for at in range(3):
            model.transformer.h[at].output[0].save("x" * 199 + str(at))
    joined = join([tracer.job, tracer.job])
    results = split(joined, model.run(Job.from_bytes(joined.to_bytes())))[1]
    assert_same(results, model.run(tracer.job))


def test_names_that_are_made_of_long_ones_are_kept_apart_too(model: LanguageModel) -> None:
    with model.scan(PROMPTS[0]) as tracer:
        for at, name in enumerate(("x" * 190 + "00000002", "x" * 199, "x" * 200)):
            model.transformer.h[at].output[0].save(name)
    results = split(joined := join([tracer.job] * 2), model.run(joined))
    for one in results:
        assert_same(one, model.run(tracer.job))
