"""Random jobs that are joined, of which some fail, against each alone in plain PyTorch.

The programs are those of `test_programs.py` and `test_step_programs.py`, and small ones with
gradients. Of each set some jobs fail; these have to fail with their own line, and the others have
to give what plain hooks on their prompts give.
"""

from __future__ import annotations

import linecache
import os
import random
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from insitu import CausalityError, InsituError, Job, LanguageModel, Results, join, split
from tests.conftest import tiny_gpt2
from tests.fidelity.oracle import SilentError, TooLateError, expected
from tests.fidelity.programs import Program, Subject, record
from tests.fidelity.test_programs import drawn, language
from tests.fidelity.test_programs import programs as traced
from tests.fidelity.test_step_programs import GREEDY, STEPS, Generates, at_step
from tests.fidelity.test_step_programs import programs as stepped
from tests.fidelity.test_step_programs import subject as steps_subject
from tests.round_trip import described
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # they are sent here
SETS = int(os.environ.get("INSITU_JOINED", "8"))
# Programs to draw from: to make one takes longer than to run a set.
POOL = min(60, 3 * SETS)
FAILING = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A job, with what it gives in plain PyTorch; or, if it fails, with the line that it names."""

    job: Job
    values: list[torch.Tensor] | None
    line: str = ""
    source: str = ""


@cache
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


@cache
def of_traces() -> Subject:
    return replace(language(), model=model(), copy=deepcopy(model().module))


@cache
def of_steps() -> Subject:
    copy = Generates(deepcopy(model().module))
    return replace(steps_subject("gpt2"), model=model(), copy=copy)


def inverse_of_nothing(value: Any) -> None:
    torch.linalg.inv((value.flatten()[:4] * 0).reshape(2, 2)).save()  # it fails


def parts_that_are_not_there(value: Any) -> None:
    value[value > 1e30].reshape(3, 1111).save()  # it fails


def no_number(value: Any) -> None:
    value[value > 1e30].backward()  # it fails


FAILURES = [inverse_of_nothing, parts_that_are_not_there, no_number]


def recorded(
    subject: Subject, program: Program, block: Callable[[], Any], fails: Any, draw: random.Random
) -> Job | None:
    """The job of a program, with a line that fails in it; None if it cannot be recorded so."""
    values: dict[str, Any] = {}
    at = draw.randrange(1, len(program.lines) + 1)
    try:
        with block() as tracer:
            invocations = [tracer.invoke(subject.prompts[prompt]) for prompt in program.prompts]
            for number, line in enumerate(program.lines, 1):
                step, line = at_step(line) if subject is of_steps() else (0, line)
                with invocations[line.invocation] as invoker, invoker.step(step):
                    for _ in record(line, subject.model, values):
                        pass
                    if number == at and fails is not None and values:
                        fails(values[draw.choice(list(values))])
    except CausalityError:  # which is found when the block is scanned
        pass
    except InsituError:
        return None
    return None if tracer.block.raised else tracer.job


def case_of(subject: Subject, program: Program, draw: random.Random) -> Case | None:
    """The case of a program. Some programs are refused, and some get a line that fails."""
    fails = draw.choice(FAILURES) if draw.random() < 0.5 else None
    options: dict[str, Any] = {}
    if subject is of_steps():
        length = STEPS + draw.randrange(3)  # what comes later changes nothing
        options = {"generate": True, **GREEDY, "max_new_tokens": length}
        fails = None if fails is no_number else fails
    try:
        values = expected(subject, program)
    except SilentError:
        return None
    except TooLateError:
        job = recorded(subject, program, partial(model().scan, **options), None, draw)
        return job and Case(job, None, "", repr(program))
    job = recorded(subject, program, partial(model().scan, **options), fails, draw)
    if job is None:
        return None
    has_failing = fails is not None and any("it fails" in _text(row) for row in _rows(job))
    if fails is not None and not has_failing:
        return Case(job, values, "", repr(program))
    return Case(job, None if fails else values, "it fails" if fails else "", repr(program))


def _rows(job: Job) -> list[Any]:
    return [node for block in job.blocks for node in block.graph]


def _text(node: Any) -> str:
    return linecache.getline(node.location.file, node.location.line)


def with_gradients(draw: random.Random) -> Case:
    """A job that writes at one block, and reads gradients at others."""
    subject, options = model(), {"max_tokens_per_pass": 6} if draw.random() < 0.2 else {}
    prompts = [torch.randint(1, 90, (1, draw.randint(1, 6))) for _ in range(draw.randint(1, 2))]
    values: list[torch.Tensor] = []
    fails = draw.random() < 0.25
    # A scan finds what fails before the run.
    with suppress(InsituError), subject.scan(**options) as tracer:
        for ids in prompts:
            written, add = draw.randrange(4), draw.uniform(-1, 1)
            read = draw.sample(range(4), draw.randint(1, 3))
            scale = draw.uniform(0.5, 2)
            with tracer.invoke(ids):
                subject.transformer.h[written].output[0][:, -1] += add
                for layer in read:
                    subject.transformer.h[layer].output[0].grad.save()
                if fails:
                    subject.transformer.h[written].output[0].grad[0, 99].save()  # it fails
                (subject.lm_head.output[:, -1] * scale).sin().sum().backward()
            values += gradients_of(subject.module, ids, written, add, read, scale)
    return Case(tracer.job, None if fails else values, "it fails" if fails else "", "gradients")


def gradients_of(
    module: nn.Module, ids: torch.Tensor, written: int, add: float, read: list[int], scale: float
) -> list[torch.Tensor]:
    """The same by plain hooks and autograd."""
    kept: dict[int, torch.Tensor] = {}

    def hook(layer: int, part: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if layer == written:
            hidden = torch.cat([hidden[:, :-1], hidden[:, -1:] + add], dim=1)
        kept[layer] = hidden = hidden.view_as(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = enumerate(module.transformer.h)
    handles = [block.register_forward_hook(partial(hook, layer)) for layer, block in blocks]
    try:
        loss = (module(ids, use_cache=False).logits[:, -1] * scale).sin().sum()
        return list(torch.autograd.grad(loss, [kept[layer] for layer in read]))
    finally:
        for handle in handles:
            handle.remove()


def pool(shard: int, count: int) -> tuple[list[Case], list[Case]]:
    """Jobs that give what they should, and jobs that fail."""
    found: list[tuple[Subject, Program]] = []

    def collect(subject: Subject, program: Program) -> None:
        if any(line.source().endswith(".save()") for line in program.lines):
            found.append((subject, program))

    for subject, strategy in ((of_traces(), traced), (of_steps(), stepped)):
        drawn(shard, count)(given(st.just(subject), strategy(subject))(collect))()
    draw = random.Random(shard)
    torch.manual_seed(shard)
    cases = [case_of(subject, program, draw) for subject, program in found]
    made = [case for case in cases if case is not None]
    made += [with_gradients(draw) for _ in range(count // 2)]
    right = [case for case in made if case.values is not None]
    return right, [case for case in made if case.values is None]


def assert_right(case: Case, own: Results) -> None:
    assert not own.failed, (own.failed[0].error, case.source)
    assert case.values is not None and len(own) == len(case.values)
    for number, value in enumerate(case.values):
        found, scale = own[str(number)], max(1.0, float(value.abs().max()) if value.numel() else 0)
        assert found.shape == value.shape and found.dtype == torch.float32
        assert torch.allclose(found, value, atol=1e-5 * scale), (number, case.source)


def assert_failed(case: Case, own: Results) -> None:
    assert own.failed, case.source
    with pytest.raises(InsituError) as alone:
        model().run(case.job)
    _, said = described(alone.value)
    assert said in [described(failure.error)[1] for failure in own.failed], (said, case.source)
    for failure in own.failed:
        assert type(failure.error) is not InsituError and failure.error.location is not None
        location = failure.error.location
        if case.line:
            assert location.file.endswith("test_joined.py"), (failure.error, case.source)
            assert case.line in linecache.getline(__file__, location.line), failure.error


def check(shard: int, sets: int, count: int) -> None:
    right, failing = pool(shard, count)
    assert len(right) > count // 2 and len(failing) > count // 10
    draw = random.Random(shard)
    for _ in range(sets):
        size = draw.randint(2, 16)
        several = [draw.random() < FAILING for _ in range(size)]
        cases = [draw.choice(failing if fails else right) for fails in several]
        joined = join([case.job for case in cases])
        if draw.random() < 0.5:
            joined = Job.from_bytes(joined.to_bytes())
        results = model().run(joined, raises=False)
        for case, own in zip(cases, split(joined, results), strict=True):
            if case.values is None:
                assert_failed(case, own)
            else:
                assert_right(case, own)
    parts = model().module.modules()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    assert all(weight.grad is None for weight in model().module.parameters())


@pytest.mark.parametrize("shard", sampled(range(2), [1]))
def test_joined_jobs_are_what_each_is_alone(shard: int) -> None:
    check(shard, SETS // 2, POOL)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(2, 12))
def test_many_joined_jobs_are_what_each_is_alone(shard: int) -> None:
    check(shard, 200, 240)
