"""Running a job on a model: each of its blocks as a block of one's own is run."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

from insitu.batching.procedure import Subject
from insitu.engine.budget import Budget
from insitu.engine.failures import FailedInvocations, first_error
from insitu.engine.fingerprint import other_habits, other_structure, other_weights
from insitu.engine.job import Job
from insitu.engine.job_outcome import Failure, Outputs
from insitu.engine.job_parts import JobBlock, Share, earlier_of
from insitu.engine.results import Results
from insitu.engine.seams import seams
from insitu.graph.cells import Missing
from insitu.graph.context import as_begun
from insitu.graph.errors import InsituError, JobError, NoValueError
from insitu.graph.location import here
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.shapes import calls_function
from insitu.graph.structure import only_data
from insitu.tracing.job_blocks import run_job_block
from insitu.tracing.jobs import RanBlock

NAMED = {"name": "its name is ", "revision": "its revision is "}
"""What a difference begins with that says nothing of values."""


def run_job(model: Subject, job: Job, budget: Budget | None = None, raises: bool = True) -> Results:
    """Runs a job.

    Args:
        model: the model.
        job: the job.
        budget: what it may spend, as `checked_budget` gives it; None if nothing is limited.
        raises: whether what invocations raise is raised.

    Raises:
        LimitError: if it takes more.
        JobError: if it is for another model.
        InsituError: if something is wrong with the run, with what there is as its `results`.
    """
    around = seams.get()
    if around is None:
        return _run(model, job, budget, raises, False)
    from insitu.engine.observed_run import unwrapped  # of use only where somebody looks

    token = seams.set(around._replace(told=set()))
    try:
        gives = around.sink is not None
        return unwrapped(partial(_run, model, job, budget, raises, gives))
    finally:
        seams.reset(token)


def _run(model: Subject, job: Job, budget: Budget | None, raises: bool, gives: bool) -> Results:
    """Runs a job, as of `run_job`; with `gives`, a sink has its saved values."""
    differences = check_model(model, job)
    with saving_data(job):
        return _run_blocks(model, job, budget, differences, raises, gives)


@contextmanager
def saving_data(job: Job) -> Generator[None]:
    """In its block the values of a job are data alone, unless it calls a function of this process.

    Such a job cannot have come from elsewhere, and its values may be of any kind.

    Args:
        job: the job.
    """
    own = any(calls_function(row[1]) for block in job.blocks for row in block.graph.rows)
    token = only_data.set(not own)
    try:
        yield
    finally:
        only_data.reset(token)


def _run_blocks(
    model: Subject,
    job: Job,
    budget: Budget | None,
    differences: Sequence[str],
    raises: bool,
    gives: bool,
) -> Results:
    """Runs the blocks of a job one after the other."""
    used = _used_later(job)
    values: dict[str, Any] = {}
    outputs: list[Outputs | None] = []
    earlier: list[RanBlock] = []
    failures: list[Failure] = []
    every: list[FailedInvocations] = []
    causes: list[FailedInvocations] = []
    for number, block in enumerate(job.blocks):
        spending = nullcontext() if budget is None else budget.spending(number)
        with spending, ordinary_tensors(), as_begun(block.casts, block.dtype):
            ran = run_job_block(model, block, earlier, budget, used[number])
            shares = _shares(job, number)
            parts = {part: ran.output_of(share) for part, share in shares.items()}
        earlier.append(ran)
        parts = {part: output for part, output in parts.items() if output is not None}
        outputs.append(replace(ran.outputs, parts=parts) if ran.outputs else None)
        every += ran.failed
        for failed in ran.failed:
            failures += _failures(number, block, failed, shares)
            if not isinstance(failed.error, NoValueError):  # which an earlier block is the cause of
                causes.append(failed)
        # The sink has the values already, and the results are to hold none of them.
        if gives:
            continue
        found = {name: ran.saves[index]._content for index, name in block.saves.items()}
        values |= {name: one for name, one in found.items() if type(one) is not Missing}
    results = Results(values, job.saves, outputs, differences, failures)
    if failures and raises:
        error = cast(InsituError, first_error([one.error for one in causes or every]))
        error.results = results
        raise error
    return results


def _shares(job: Job, number: int) -> dict[int, Share]:
    """The part of a block that each job of a joined job has, by the number of the job."""
    return {
        part: share
        for part, one in enumerate(job.parts)
        for share in one.shares
        if share.block == number
    }


def _failures(
    number: int, block: JobBlock, failed: FailedInvocations, shares: Mapping[int, Share]
) -> list[Failure]:
    """A failure in a block, for each of the jobs that it is of."""
    error, found = cast(InsituError, failed.error), list[Failure]()
    whole = Share(number, 0, len(block.prompts), 0, len(block.graph))
    for part, share in (shares or {0: whole}).items():
        own = [one for one in failed.invocations if 0 <= one - share.first < share.count]
        nodes = [one for one in failed.nodes if 0 <= one - share.start < share.size]
        if own or nodes:
            names = [block.saves[node] for node in sorted(nodes) if node in block.saves]
            found.append(Failure(number, own, names, error, part))
    return found


def _used_later(job: Job) -> list[set[int]]:
    """The nodes of each block whose values later blocks use."""
    found: list[set[int]] = [set() for _ in job.blocks]
    for block in job.blocks[1:]:
        for row in block.graph.rows:
            for item in earlier_of(row):
                found[item.block].add(item.node)
    return found


def check_model(model: Subject, job: Job) -> list[str]:
    """Returns how a model differs from the one that a job was made for, if it can run it.

    Args:
        model: the model that is to run it.
        job: the job.

    Raises:
        JobError: if the model has another structure, or other edits are in force.
    """
    wanted, there = job.model, model.described
    different = other_structure(wanted.fingerprint, there.fingerprint)
    if different:
        raise JobError(
            f"The job is for another model than this one: {'; '.join(different)}.", here()
        )
    # The job's own edits are among its lines: the model without any runs it.
    if there.edits and [*there.edits] != [*wanted.edits]:
        raise JobError(
            "This model has edits that the job was not recorded with, and a job is all that it "
            "runs: run it on the model without edits, or record it in a block of this one.",
            here(),
        )
    found = other_weights(wanted.fingerprint, there.fingerprint)
    for what in NAMED:
        then, now = getattr(wanted, what), getattr(there, what)
        # A name that one side does not know says nothing.
        if then and now and then != now:
            found.append(f"{NAMED[what]}{now!r:.200}, and not {then!r:.200}")
    given = [set(block.options) for block in job.blocks if block.procedure == "generate"]
    told = set[str].intersection(*given) if given else None
    return found + other_habits(wanted.fingerprint, there.fingerprint, told)
