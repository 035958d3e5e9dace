"""What a job would give and what it would take: everything that is known of its run before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned
from insitu.display.saved_values import SavedValue
from insitu.engine.budget import Beforehand, Budget
from insitu.engine.job import Job
from insitu.engine.limits import Limits
from insitu.engine.results import structure
from insitu.graph.context import as_begun
from insitu.graph.location import Location
from insitu.graph.ordinary import ordinary_tensors
from insitu.tracing.block_check import Expected, check_block
from insitu.tracing.job_running import check_model, saving_data
from insitu.tracing.jobs import RanBlock, bind


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
        is_bounded: whether no recorded value can be larger than it was counted as.
        graph_numbers: of the operations of what was recorded, those that are one for each number
            that is read or made.
        heaviest: the line that takes most of what was recorded, None if there is none.
    """

    results: Mapping[str, Expected]
    plans: Sequence[Planned]
    model_flops: Estimate
    graph_flops: Estimate
    peak_bytes: Estimate
    weight_bytes: int
    differences: Sequence[str]
    is_bounded: bool
    graph_numbers: float = 0.0
    heaviest: Location | None = None

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
        InsituError: if something is wrong with the run, as far as that is found beforehand.
    """
    differences = check_model(model, job)
    limits = Limits() if budget is None else budget.limits
    limits.check_graphs([block.graph for block in job.blocks])
    results: dict[str, Expected] = {}
    plans: list[Planned] = []
    model_flops = graph_flops = sure = numbers = most = 0.0
    heaviest: Location | None = None
    peak = kept = unknown = at_most = 0
    ways: set[str] = set()
    earlier: list[RanBlock] = []
    blocks: list[Beforehand] = []
    for block in job.blocks:
        spending = nullcontext() if budget is None else budget.spending()
        # In the context in which the block was recorded: dtypes depend on it.
        context = as_begun(block.casts, block.dtype)
        with spending, ordinary_tensors(), context, saving_data(job):
            run = bind(model, block, earlier, dry=True)
            found = check_block(run, budget)
        costs, recorded = found.costs, found.recorded
        earlier.append(RanBlock(run.lines.saves, (), run))
        plans.append(found.plan)
        results |= {name: found.saves[index] for index, name in block.saves.items()}
        ways.add(costs.how)
        model_flops, graph_flops = model_flops + costs.flops, graph_flops + recorded.flops
        sure, numbers = sure + costs.flops + recorded.sure, numbers + recorded.numbers
        if recorded.heaviest is not None and recorded.flops > most:
            most, heaviest = recorded.flops, run.lines.graph[recorded.heaviest].location
        unknown, at_most = unknown + recorded.unknown, at_most + recorded.largest
        # What earlier blocks have saved is in memory while later ones run.
        peak = max(peak, kept + costs.bytes + recorded.bytes)
        blocks.append(Beforehand(recorded.known, kept + costs.bytes))
        kept += sum(found.saves[index].bytes or 0 for index in block.saves)
        flops = model_flops + graph_flops
        line = block.prompts[0].location
        limits.check("operations", flops, f"The job takes {flops:.3g} operations", line)
        what = f"The job takes {peak:,} bytes at once beside the model's weights"
        limits.check("peak_bytes", peak, what, line)
    if budget is not None:
        budget.blocks, budget.flops = blocks, sure  # the others are counted when they come
    weights = model.snapshot.weight_bytes
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
        not unknown,
        numbers,
        heaviest,
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
    # Only these limits need the size of every value.
    if limits.bounds_costs:
        check_job(model, job, budget)
        # Looking is not running: the clock begins anew with the run.
        budget.stop_clock()
    else:
        limits.check_graphs([block.graph for block in job.blocks])
    return budget
