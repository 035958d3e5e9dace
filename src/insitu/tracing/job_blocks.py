"""Running a block of a job. What fails in it takes what uses something of it, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from insitu.batching.pass_plan import PassPlan
from insitu.batching.procedure import Subject
from insitu.engine.budget import Budget
from insitu.engine.dependence import Dependence, Lost
from insitu.engine.failures import FailedInvocations, ends_all
from insitu.engine.job_parts import JobBlock, Share
from insitu.engine.passes import Outputs
from insitu.graph.cells import Cell, Holder, Missing
from insitu.graph.errors import ExecutionError, InsituError, LimitError, at_line
from insitu.graph.node import Earlier
from insitu.graph.operations import KEEP, SAVE
from insitu.tracing.job_binding import Bound, JobLines, Place, bind
from insitu.tracing.job_isolation import Part, absent_values, failing_beforehand, part_of
from insitu.tracing.one_run import Ran
from insitu.tracing.planning import prepare
from insitu.tracing.running import run_block, verify


@dataclass(slots=True, eq=False)
class RanBlock:
    """What a block of a job gives: for the results, and for the blocks after it.

    Attributes:
        saves: where the values are that it saves, by the node.
        outputs: what its generation returned, None for a trace.
        failed: what failed in it.
        nodes: the node of `lines` for each node that has run; None if all have.
        lines: what has run, None if nothing has.
    """

    saves: Mapping[int, Holder]
    outputs: Outputs | None
    failed: Sequence[FailedInvocations]
    lines: JobLines | None
    nodes: Mapping[int, int] | None = None

    def fake(self, index: int) -> Any:
        """Returns the value of a node with fake tensors.

        Args:
            index: the node.
        """
        assert self.lines is not None  # nobody has the value of a block that has not run
        return self.lines.fake(index if self.nodes is None else self.nodes[index])


def run_job_block(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[RanBlock],
    budget: Budget | None,
    shares: Mapping[int, Share],
    kept: Collection[int] = (),
) -> RanBlock:
    """Runs a block of a job.

    Args:
        model: the model.
        block: the block.
        earlier: the blocks before it.
        budget: what the job may spend, None if nothing is limited.
        shares: of a joined job, what of the block is of which of its jobs, by their numbers.
        kept: the nodes whose values later blocks use.

    Raises:
        LimitError: if it takes more.
    """

    def missing(item: Earlier) -> Missing | None:
        content = earlier[item.block].saves[item.node]._content  # pyright: ignore[reportPrivateUsage]
        return content if type(content) is Missing else None

    absent = absent_values(block.graph, missing) if earlier else {}
    if not absent:
        try:
            bound = bind(model, block, earlier, place=Place(len(earlier) + 1, kept))
            ran = _run(model, block, bound)
            outputs = _with_parts(ran.outputs, shares, bound, range(len(block.prompts)))
            return RanBlock(bound.lines.saves, outputs, ran.failed, bound.lines)
        except InsituError as error:
            if ends_all(error):
                raise
            found = error
        if len(block.prompts) == 1:
            return _without_values(block, [_whole(block, found)])
    return _run_part(model, block, earlier, absent, budget, shares, kept)


def _run_part(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[RanBlock],
    absent: Mapping[int, InsituError],
    budget: Budget | None,
    shares: Mapping[int, Share],
    kept: Collection[int],
) -> RanBlock:
    """Runs what is left of a block without what cannot run."""
    dependence, failed, lost = Dependence(block.graph), list[FailedInvocations](), Lost()

    def leave_out(more: Sequence[FailedInvocations]) -> Lost:
        failed.extend(more)
        nodes = lost.nodes.union(*(one.nodes for one in more))
        return Lost(nodes, lost.invocations.union(*(one.invocations for one in more)))

    for node, error in absent.items():
        if node not in lost.nodes:
            gone = dependence.lost_by([node], ())
            own = sorted(gone.invocations)
            blamed = sorted(dependence.blamed([node], ()))
            lost = leave_out([FailedInvocations(error, blamed, own, gone.nodes)])
    model.load()

    def check(part: JobBlock) -> InsituError | None:
        try:
            bound = bind(model, part, earlier, dry=True)
            lines, root = bound.lines, model.snapshot.root
            if part.demanded is not None:
                verify(model, part.demanded.options, part.demanded.mark)
            prepare(
                model, bound.procedure, lines.graph, lines.saves, bound.requests, root, dry=True
            )
        except InsituError as error:
            return error
        return None

    lost = leave_out(failing_beforehand(block, dependence, lost, check))
    part = part_of(block, lost)
    if not part.numbers:
        return _without_values(block, failed)
    with nullcontext() if budget is None else budget.part(part.nodes):
        try:
            there = [at for at, node in enumerate(part.nodes) if node in kept]
            place = Place(len(earlier) + 1, there, part.numbers)
            bound = bind(model, part.block, earlier, place=place)
            ran = _run(model, part.block, bound)
        except InsituError as error:
            if ends_all(error):
                raise
            own = _whole(part.block, error)
            leave_out([_of_block(own, part)])
            return _without_values(block, failed)
    moved = {node: at for at, node in enumerate(part.nodes)}
    failed += [_of_block(one, part) for one in ran.failed]
    without = _without_values(block, failed)
    saved = {node: bound.lines.saves[at] for node, at in moved.items() if at in bound.lines.saves}
    outputs = ran.outputs
    if outputs is not None and len(part.numbers) < len(block.prompts):
        each: list[Any] = [None] * len(block.prompts)
        for number, output in zip(part.numbers, outputs.each, strict=True):
            each[number] = output
        outputs = Outputs(None, each)
    outputs = _with_parts(outputs, shares, bound, part.numbers)
    return RanBlock({**without.saves, **saved}, outputs, failed, bound.lines, moved)


def _with_parts(
    outputs: Outputs | None, shares: Mapping[int, Share], bound: Bound, numbers: Sequence[int]
) -> Outputs | None:
    """What a generation returned, with what one call for each job of a joined one would return.

    Args:
        outputs: what it returned, None for a trace.
        shares: as of `run_job_block`.
        bound: what has run.
        numbers: the invocation of the block that each of its requests is of.
    """
    if outputs is None or not shares:
        return outputs
    requests, parts = dict(zip(numbers, bound.requests, strict=True)), dict[int, Any]()
    for number, share in shares.items():
        own = range(share.first, share.first + share.count)
        each = [outputs.each[one] for one in own]
        if share.count == len(outputs.each):
            parts[number] = outputs.whole
        elif all(one is not None for one in each):
            parts[number] = bound.procedure.whole(each, [requests[one] for one in own])
    return Outputs(outputs.whole, outputs.each, parts)


def _run(model: Subject, block: JobBlock, bound: Bound) -> Ran:
    """Runs a block, or a part of one. What invocations raise is Insitu's own."""
    planned: list[PassPlan] = []
    location = block.prompts[0].location
    try:
        demanded = block.demanded and (block.demanded.options, block.demanded.mark)
        ran = run_block(model, bound.procedure, bound.lines, bound.requests, demanded, planned)
    except InsituError as error:
        if isinstance(error, LimitError) and error.location is None:
            raise at_line(error, location) from None
        raise
    except Exception as error:
        raise _explained(error, block, [0]) from error
    failed = [replace(one, error=_explained(one.error, block, one.blamed)) for one in ran.failed]
    return ran._replace(failed=failed)


def _explained(error: Exception, block: JobBlock, blamed: Sequence[int]) -> InsituError:
    """The error for what the model itself raises, or its `generate`."""
    if isinstance(error, InsituError):
        return error
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
    location = block.prompts[blamed[0] if blamed else 0].location
    made = ExecutionError(f"The model raised {said}", location)
    made.__cause__ = error
    return made


def _whole(block: JobBlock, error: InsituError) -> FailedInvocations:
    """A failure that takes all of a block."""
    everything = [*range(len(block.prompts))]
    return FailedInvocations(error, everything, everything, frozenset(range(len(block.graph))))


def _of_block(failed: FailedInvocations, part: Part) -> FailedInvocations:
    """A failure in a part of a block, with the numbers of the block."""
    return FailedInvocations(
        failed.error,
        [part.numbers[number] for number in failed.blamed],
        [part.numbers[number] for number in failed.invocations],
        frozenset(part.nodes[node] for node in failed.nodes),
    )


def _without_values(block: JobBlock, failed: Sequence[FailedInvocations]) -> RanBlock:
    """A block of which nothing is there, and why."""
    saves: dict[int, Holder] = {}
    for index, row in enumerate(block.graph.rows):
        if row[0] in (SAVE, KEEP):
            saves[index] = cell = Cell()
            why = next((one.error for one in failed if index in one.nodes), None)
            if why is not None:
                cell.content = Missing(f"its run raised {type(why).__name__}.")
    return RanBlock(saves, None, failed, None)
