"""What a job would give and what it would take: everything that is known of its run before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned, Summary
from insitu.display.saved_values import SavedValue
from insitu.engine.budget import Beforehand, Budget
from insitu.engine.counting import Counts
from insitu.engine.job import Job
from insitu.engine.limits import Limits
from insitu.engine.probe import Call
from insitu.engine.results import structure
from insitu.graph.context import as_begun
from insitu.graph.errors import UnknownShapeError
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.shapes import dtype_of, outlined, shape_of
from insitu.graph.structure import tensors_of
from insitu.tracing.graph_costs import graph_costs
from insitu.tracing.job_running import check_model
from insitu.tracing.jobs import RanBlock, bind
from insitu.tracing.planning import explained
from insitu.tracing.run import Run
from insitu.tracing.running import prepare

_NONE = Counts(0.0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Expected:
    """A saved value, before there is one.

    Attributes:
        shape: the size of the tensor, or sizes in the structure of a nested value; None if that is
            not known before the run.
        dtype: its dtype, or dtypes in the structure of the value; None if not known.
        bytes: how many bytes it takes; None if not known.
        reason: why something of it is not known, or what it is an estimate of; "" if it is certain.
    """

    shape: Any
    dtype: Any
    bytes: int | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that is not certain.

    Attributes:
        value: the number.
        how: how it was made, and what it leaves out.
    """

    value: float
    how: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class JobCheck:
    """What a job would give and what it would take: what `model.check(job)` returns.

    Attributes:
        results: each saved value, by name.
        plans: how each block would run: its passes, and what each leaves out.
        model_flops: floating-point operations of the model's passes.
        graph_flops: floating-point operations of what was recorded.
        peak_bytes: the most memory that is in use at once, the weights included.
        weight_bytes: the memory of the weights.
        differences: how the model differs from the one that the job was made for.
    """

    results: Mapping[str, Expected]
    plans: Sequence[Planned]
    model_flops: Estimate
    graph_flops: Estimate
    peak_bytes: Estimate
    weight_bytes: int
    differences: Sequence[str]

    @property
    def passes(self) -> int:
        """How many passes of the model all blocks take together."""
        return sum(len(plan.passes) for plan in self.plans)

    @property
    def flops(self) -> float:
        """Floating-point operations of the model and of what was recorded."""
        return self.model_flops.value + self.graph_flops.value

    @property
    def result_bytes(self) -> int | None:
        """How many bytes all results have, None if that of one is not known."""
        found = [expected.bytes for expected in self.results.values()]
        return None if None in found else sum(size for size in found if size is not None)

    def described(self, saves: Mapping[str, str]) -> list[SavedValue]:
        """Returns what each saved value would be.

        Args:
            saves: the expression that each was saved of: `job.saves`.
        """
        return [
            SavedValue(
                name,
                saves.get(name, ""),
                structure(one.shape),
                structure(one.dtype),
                one.bytes,
                one.reason,
            )
            for name, one in self.results.items()
        ]

    def lines(self) -> list[str]:
        """Returns what it would take, a line for each number."""
        estimates = (
            ("model", self.model_flops, 1e9, "GFLOP"),
            ("recorded lines", self.graph_flops, 1e9, "GFLOP"),
            ("memory", self.peak_bytes, 2**20, "MiB at the peak"),
        )
        return [
            f"{self.passes} pass{'es' * (self.passes != 1)}; nothing was run",
            *(
                f"{what}: {one.value / unit:,.4g} {name} ({one.how})"
                for what, one, unit, name in estimates
            ),
            *(f"another model: {what}" for what in self.differences),
        ]

    def numbers(self) -> dict[str, Any]:
        """Returns what it would take as plain data."""
        return {
            "passes": self.passes,
            "result_bytes": self.result_bytes,
            "weight_bytes": self.weight_bytes,
            "model_flops": asdict(self.model_flops),
            "graph_flops": asdict(self.graph_flops),
            "peak_bytes": asdict(self.peak_bytes),
            "differences": [*self.differences],
        }

    def __repr__(self) -> str:
        values = [
            f"  {one.name}: {one.dtype} {one.shape}, "
            f"{'?' if one.bytes is None else f'{one.bytes:,}'} bytes"
            f"{f' ({one.note})' if one.note else ''}"
            for one in self.described({})
        ]
        return "\n".join([*self.lines(), *values])


def check_job(model: Subject, job: Job, budget: Budget | None = None) -> JobCheck:
    """Returns what a job would give and take.

    Args:
        model: the model that is to run it.
        job: the job.
        budget: what it may spend, None if nothing is limited. What a run of it has to know is
            noted there.

    Raises:
        LimitError: if it takes more.
        JobError: if it is for another model.
        InsituError: for what is wrong with the run, as far as that is found beforehand.
    """
    differences = check_model(model, job)
    limits = Limits() if budget is None else budget.limits
    limits.check_graphs([block.graph for block in job.blocks])
    results: dict[str, Expected] = {}
    plans: list[Planned] = []
    model_flops = graph_flops = sure = 0.0
    peak = kept = unknown = at_most = 0
    ways: set[str] = set()
    earlier: list[RanBlock] = []
    blocks: list[Beforehand] = []
    for block in job.blocks:
        spending = nullcontext() if budget is None else budget.spending()
        with spending, ordinary_tensors(), as_begun(block.casts, block.dtype):
            run = bind(model, block, earlier, dry=True)
            prepared, _ = prepare(run, dry=True)
            plan = explained(run)
            costs = _pass_costs(run, plan)
            recorded = graph_costs(run.lines, prepared.plan, steps_of(run), budget)
            found = {name: _expected(run, index) for index, name in block.saves.items()}
        earlier.append(RanBlock(run.lines.saves, (), run))
        plans.append(plan)
        results |= found
        ways.add(costs.how)
        model_flops, graph_flops = model_flops + costs.flops, graph_flops + recorded.flops
        sure += costs.flops + recorded.sure
        unknown, at_most = unknown + recorded.unknown, at_most + recorded.largest
        peak = max(peak, kept + costs.bytes + recorded.bytes)
        blocks.append(Beforehand(recorded.known, kept + costs.bytes))
        kept += sum(one.bytes or 0 for one in found.values())
        flops = model_flops + graph_flops
        line = block.prompts[0].location
        limits.check("operations", flops, f"The job takes {flops:.3g} operations", line)
        what = f"The job takes {peak:,} bytes at once beside the model's weights"
        limits.check("peak_bytes", peak, what, line)
    if budget is not None:
        budget.blocks, budget.flops = blocks, sure  # the others are counted when they come
    weights = _weight_bytes(model)
    beside = f"; {at_most} at the largest size that they can have" * (at_most > 0)
    beside += f"; {unknown} of unknown size left out" * (unknown > 0)
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


def checked_budget(model: Subject, job: Job, limits: Limits) -> Budget:
    """Returns what the run of a job may spend, once it is known that the job fits.

    Args:
        model: the model that is to run it.
        job: the job.
        limits: what it may take.

    Raises:
        LimitError: if it takes more.
        InsituError: as of `check_job`.
    """
    budget = Budget(limits)
    if limits.bounds_costs:
        check_job(model, job, budget)
        budget.stop_clock()
    else:
        limits.check_graphs([block.graph for block in job.blocks])
    return budget


def steps_of(run: Run) -> int:
    """Returns how many steps a block has at most, as far as that is known.

    Args:
        run: the block.
    """
    counts = [run.procedure.steps_of(request) for request in run.requests]
    return max([count or 1 for count in counts])


def _expected(run: Run, index: int) -> Expected:
    """What a save would give."""
    lines, procedure = run.lines, run.procedure
    graph = lines.graph
    try:
        value, reason = lines.fakes[index], ""
    except KeyError:
        try:
            value, reason = outlined(lines, index), "of a later step: sizes are those of the first"
        except UnknownShapeError as error:
            return Expected(None, None, None, str(error).splitlines()[0])
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(value))
    if graph.repeats_node(index):
        counts = [procedure.steps_of(request) for request in run.requests]
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


class _PassCosts(NamedTuple):
    """What the passes of a block take.

    Attributes:
        flops: floating-point operations of the model.
        bytes: what the largest pass holds at once, beside the weights.
        how: how the numbers were made.
    """

    flops: float
    bytes: int
    how: str


def _pass_costs(run: Run, plan: Planned) -> _PassCosts:
    """Returns what the model's passes of a block take.

    Args:
        run: the block.
        plan: its passes.
    """
    calls = [run.call(number) for number in range(len(run.requests))]
    counts = _counted(run.model, calls)
    steps = [run.procedure.steps_of(request) or 1 for request in run.requests]
    keeps = run.lines.graph.differentiates
    flops, most = 0.0, 0
    ways: set[str] = set()
    for single in plan.passes:
        own = [(calls[number], counts[number]) for number in single.invocations]
        most_steps = max(steps[number] for number in single.invocations)
        if single.flops:
            flops += single.flops
            ways.add("by the sizes of the blocks that its passes run")
        else:
            flops += sum(
                counts[at].flops * (1 + (steps[at] - 1) / _places(calls[at])[1])
                for at in single.invocations
            )
            ways.add(
                "left out: no forward can be made without data"
                if _NONE in (count for _, count in own)
                else "in forwards without data" + ", further steps in proportion" * (most_steps > 1)
            )
        most = max(most, _bytes(single, own, most_steps, keeps))
    return _PassCosts(flops, most, " and ".join(sorted(ways)))


def _counted(model: Subject, calls: Sequence[Call]) -> list[Counts]:
    """What a forward of each prompt takes; nothing where that cannot be counted."""
    known: dict[str, Counts] = {}
    found: list[Counts] = []
    for call in calls:
        signature = call.signature()
        if signature not in known:
            try:
                known[signature] = model.count(call)
            except UnknownShapeError:
                known[signature] = _NONE
        found.append(known[signature])
    return found


def _places(call: Call) -> tuple[int, int]:
    """How many rows and positions a call has: those of a decoder, if it has one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        given = call.kwargs.get(name)
        if isinstance(given, torch.Tensor):
            return given.shape[0], max(given.shape[1], 1)
    return 1, 1


def _bytes(single: Summary, own: Sequence[tuple[Call, Counts]], steps: int, keeps: bool) -> int:
    """What a pass holds at once: with `keeps`, all that autograd may keep of it."""
    found = 0.0
    for call, count in own:
        rows, positions = _places(call)
        held = count.peak + (count.made if keeps else 0)
        held += count.left * (steps - 1) / positions  # its cache grows with each step
        if single.rows:  # which of its own places it shares with others is not looked at
            held *= single.rows * single.positions / (rows * positions * len(own))
        found += held
    return int(found)
