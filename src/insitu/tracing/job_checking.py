"""Checking a job on a model: everything that can be known of its run before it."""

from __future__ import annotations

from insitu.batching.procedure import Subject
from insitu.graph.context import as_begun
from insitu.graph.errors import UnknownShapeError
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.shapes import dtype_of, outlined, shape_of
from insitu.graph.structure import tensors_of
from insitu.runtime.job import Job
from insitu.runtime.job_check import Estimate, Expected, JobCheck
from insitu.runtime.summary import Planned
from insitu.tracing.job_costs import graph_bytes, graph_costs, model_costs
from insitu.tracing.job_running import Bound, JobLines, bind, check_model
from insitu.tracing.planning import prepare


def check_job(model: Subject, job: Job) -> JobCheck:
    """Returns what a job would give and take.

    Args:
        model: the model that is to run it.
        job: the job.

    Raises:
        JobError: if it is for another model.
        InsituError: for what is wrong with the run, as far as that is found beforehand.
    """
    differences = check_model(model, job)
    results: dict[str, Expected] = {}
    plans: list[Planned] = []
    model_flops = graph_flops = 0.0
    peak = kept = unknown = 0
    ways: set[str] = set()
    earlier: list[JobLines] = []
    for block in job.blocks:
        with ordinary_tensors(), as_begun(block.casts, block.dtype):
            bound = bind(model, block, earlier, dry=True)
            lines = bound.lines
            prepared, passes = prepare(
                model,
                bound.procedure,
                lines.graph,
                lines.saves,
                bound.requests,
                model.snapshot.root,
                dry=True,
            )
            plan = Planned([single.told() for single in passes if single is not None])
            flops, missing = graph_costs(lines)
            costs = model_costs(model, bound, plan)
            found = {name: _expected(bound, index) for index, name in block.saves.items()}
        earlier.append(lines)
        plans.append(plan)
        results |= found
        ways.add(costs.how)
        model_flops, graph_flops = model_flops + costs.flops, graph_flops + flops
        unknown += missing
        saved = sum(one.bytes or 0 for one in found.values())
        peak = max(peak, kept + costs.bytes + graph_bytes(lines, prepared.plan) + saved)
        kept += saved
    weights = _weight_bytes(model)
    beside = f"; {unknown} of unknown size left out" * (unknown > 0)
    return JobCheck(
        results,
        plans,
        Estimate(model_flops, f"counted {' and '.join(sorted(ways))}"),
        Estimate(graph_flops, f"counted operation by operation, without data{beside}"),
        Estimate(
            float(weights + peak),
            "weights, what the largest pass holds, recorded values and results; without what "
            f"kernels and allocators take{beside}",
        ),
        weights,
        differences,
    )


def _expected(bound: Bound, index: int) -> Expected:
    """What a save would give."""
    lines, procedure = bound.lines, bound.procedure
    graph = lines.graph
    try:
        value, reason = lines.fakes[index], ""
    except KeyError:
        try:
            value, reason = outlined(lines, index), "of a later step: sizes are those of the first"
        except UnknownShapeError as error:
            return Expected(None, None, None, str(error).splitlines()[0])
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
    if any(start <= index < end for start, end in graph.repeats):
        counts = [procedure.steps_of(request) for request in bound.requests]
        known = [count for count in counts if count is not None]
        steps = max(known) if len(known) == len(counts) else None
        if steps is None:
            return Expected(shape_of(value), dtype_of(value), None, "a list, of unknown length")
        size *= steps
        reason = f"a list of at most {steps}, of which the first has this shape"
    if index in graph.optional:
        reason = reason or "it may be missing"
    return Expected(shape_of(value), dtype_of(value), size, reason)


def _weight_bytes(model: Subject) -> int:
    """The memory of the weights, in the dtypes that they have or will have."""
    tensors = {id(one): one for one in model.snapshot.root.parameters()}
    tensors |= {id(one): one for one in model.snapshot.root.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
