"""Running a job on a model: each of its blocks as a block of one's own is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from insitu.batching.procedure import Procedure, Subject
from insitu.graph.cells import Cell, Holder
from insitu.graph.context import Casts, as_begun
from insitu.graph.errors import ExecutionError, InsituError, JobError, LimitError, at_line
from insitu.graph.lines import ShapeSource
from insitu.graph.location import here
from insitu.graph.location import mark as here_mark
from insitu.graph.node import Carried, Earlier, Graph
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.shapes import fake_value
from insitu.graph.structure import map_structure
from insitu.runtime.budget import Budget
from insitu.runtime.failures import first_error
from insitu.runtime.fingerprint import other_habits, other_structure, other_weights
from insitu.runtime.job import Job
from insitu.runtime.job_parts import JobBlock, JobPrompt
from insitu.runtime.passes import Outputs
from insitu.runtime.results import Results
from insitu.runtime.summary import Summary
from insitu.tracing.graph_check import check_graph
from insitu.tracing.job_making import exchanged
from insitu.tracing.running import run_block
from insitu.tracing.site_shapes import SiteShapes


class JobLines:
    """What a block of a job has recorded, with places for its values: a `Lines`.

    Args:
        graph: the graph.
        shapes: gives the shapes at its sites.
        casts: the autocast that the block began with.
        dtype: the default dtype that it began with.
    """

    as_first_step = False
    counting: AbstractContextManager[Any] | None = None

    def __init__(self, graph: Graph, shapes: ShapeSource, casts: Casts, dtype: torch.dtype) -> None:
        self.graph = graph
        self.saves: dict[int, Holder] = {
            index: Cell() for index, row in enumerate(graph.rows) if row[0] in (SAVE, KEEP)
        }
        self.shapes: ShapeSource | None = shapes
        self.fakes: dict[int, Any] = {}
        self.casts = casts
        self.dtype = dtype


class Bound(NamedTuple):
    """A block of a job, made ready to run on a model.

    Attributes:
        procedure: how it runs.
        lines: what was recorded.
        requests: what its invocations are given.
    """

    procedure: Procedure[Any]
    lines: JobLines
    requests: Sequence[Any]


def run_job(model: Subject, job: Job, budget: Budget | None = None) -> Results:
    """Runs a job.

    Args:
        model: the model.
        job: the job.
        budget: what it may spend, as `checked_budget` gives it; None if nothing is limited.

    Raises:
        LimitError: if it takes more.
        JobError: if it is for another model.
        InsituError: for what is wrong with the run.
    """
    differences = check_model(model, job)
    values: dict[str, Any] = {}
    outputs: list[Outputs | None] = []
    earlier: list[JobLines] = []
    for number, block in enumerate(job.blocks):
        spending = nullcontext() if budget is None else budget.spending(number)
        with spending, ordinary_tensors(), as_begun(block.casts, block.dtype):
            bound = bind(model, block, earlier)
            outputs.append(_run(model, block, bound))
        lines = bound.lines
        earlier.append(lines)
        values |= {name: lines.saves[index]._content for index, name in block.saves.items()}  # pyright: ignore[reportPrivateUsage]
    return Results(values, job.saves, outputs, differences)


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
    if there.edits and [*there.edits] != [*wanted.edits]:
        raise JobError(
            "This model has edits that the job was not recorded with, and a job is all that it "
            "runs: run it on the model without edits, or record it in a block of this one.",
            here(),
        )
    found = other_weights(wanted.fingerprint, there.fingerprint)
    for what in ("name", "revision"):
        then, now = getattr(wanted, what), getattr(there, what)
        if then and now and then != now:
            found.append(f"its {what} is {now!r:.200}, and not {then!r:.200}")
    given = [set(block.options) for block in job.blocks if block.procedure == "generate"]
    told = set[str].intersection(*given) if given else None
    return found + other_habits(wanted.fingerprint, there.fingerprint, told)


def bind(model: Subject, block: JobBlock, earlier: Sequence[JobLines], dry: bool = False) -> Bound:
    """Makes a block of a job ready to run.

    Args:
        model: the model.
        block: the block.
        earlier: the blocks before it, whose values it may use.
        dry: whether it will not run.

    Raises:
        InsituError: if the model cannot take its options or prompts, or lacks what its graph names.
    """
    mark = next((one.mark for one in block.prompts if one.mark is not None), here_mark())
    procedure = model.procedure(block.procedure, block.options, mark, dry)
    requests = [procedure.received(_copied(prompt)) for prompt in block.prompts]
    graph = block.graph
    if block.demanded is not None:
        for number in block.demanded.prompts:
            requests[number] = procedure.demanding(requests[number], block.demanded.options)
    check_graph(graph, model.modules, requests, procedure)

    def leaf(item: Any) -> Any:
        if type(item) is not Earlier:
            return item
        lines = earlier[item.block]
        return Carried(lines.saves[item.node], lambda: fake_value(lines, item.node))

    if any(row[4] for row in graph.rows):
        graph = exchanged(graph, leaf)
    shapes = SiteShapes(model, procedure, requests, graph)
    return Bound(procedure, JobLines(graph, shapes, block.casts, block.dtype), requests)


def _run(model: Subject, block: JobBlock, bound: Bound) -> Outputs | None:
    """Runs a block, and returns what the model returned, if the procedure promises that."""
    told: list[Callable[[], Summary]] = []
    try:
        demanded = block.demanded and (block.demanded.options, block.demanded.mark)
        ran = run_block(model, bound.procedure, bound.lines, bound.requests, demanded, told)
        if ran.failed:
            raise first_error(ran.failed)
        return ran.outputs
    except InsituError as error:
        if isinstance(error, LimitError) and error.location is None:
            raise at_line(error, block.prompts[0].location) from None
        raise
    except Exception as error:  # of the model's own, or of its `generate`
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
        location = block.prompts[0].location
        raise ExecutionError(f"The model raised {said}", location) from error


def _copied(prompt: JobPrompt) -> JobPrompt:
    """A prompt into which the model may write, and the job stays as it was."""

    def leaf(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return item if item.requires_grad else item.clone()

    ids, mask, args, kwargs = map_structure(
        leaf, (prompt.ids, prompt.mask, prompt.args, dict(prompt.kwargs))
    )
    return JobPrompt(ids, mask, args, kwargs, prompt.seed, prompt.mark, prompt.steps)
