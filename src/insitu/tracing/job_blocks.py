"""Running a block of a job. What fails in it takes what uses something of it, and nothing else.

A job may be made of several, of people who know nothing of each other. It may be a prompt that the
model cannot take, a write that comes too late, or a value of an earlier block that is not there. So
it is found before the block runs, and the rest runs without it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from insitu.batching.procedure import Subject
from insitu.engine.budget import Budget
from insitu.engine.dependence import Dependence, Lost
from insitu.engine.failures import FailedInvocations, ends_all
from insitu.engine.job_outcome import Outputs
from insitu.engine.job_parts import JobBlock, earlier_of
from insitu.engine.partial_blocks import Rest, part_of
from insitu.graph.cells import Cell, Holder, Missing
from insitu.graph.errors import (
    ExecutionError,
    InsituError,
    LimitError,
    NoValueError,
    at_line,
)
from insitu.graph.expression import expression
from insitu.graph.node import Earlier, Graph
from insitu.graph.operations import KEEP, SAVE
from insitu.tracing.beforehand import verify
from insitu.tracing.isolation import spread_outputs
from insitu.tracing.jobs import RanBlock, bind
from insitu.tracing.run import Run
from insitu.tracing.running import prepare, run_block


def run_job_block(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[RanBlock],
    budget: Budget | None,
    kept: Collection[int] = (),
) -> RanBlock:
    """Runs a block of a job.

    Args:
        model: the model.
        block: the block.
        earlier: the blocks before it.
        budget: what the job may spend, None if nothing is limited.
        kept: the nodes whose values later blocks use.

    Raises:
        LimitError: if it takes more.
    """

    def missing(item: Earlier) -> Missing | None:
        content = earlier[item.block].saves[item.node]._content
        return content if type(content) is Missing else None

    absent = _absent_values(block.graph, missing) if earlier else {}
    if not absent:
        try:
            run = bind(model, block, earlier, kept)
            _run(run, block)
            return RanBlock(run.lines.saves, run.failed, run, run.outputs)
        except InsituError as error:
            if ends_all(error):
                raise
            found = error
        # There are no others that could be run without it.
        if len(block.prompts) == 1:
            return _without_values(block, [_whole(block, found)])
    return _run_part(model, block, earlier, absent, budget, kept)


def _run_part(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[RanBlock],
    absent: Mapping[int, InsituError],
    budget: Budget | None,
    kept: Collection[int],
) -> RanBlock:
    """Runs a block without the invocations that cannot run."""
    dependence, failed, lost = Dependence(block.graph), list[FailedInvocations](), Lost()

    for node, error in absent.items():
        if node not in lost.nodes:
            gone = dependence.lost_by([node], ())
            own = sorted(gone.invocations)
            blamed = sorted(dependence.blamed([node], ()))
            failed.append(FailedInvocations(error, blamed, own, gone.nodes))
            lost |= gone
    # Whether the model can give what values demand is known only with its weights.
    model.load()

    def check(part: JobBlock) -> InsituError | None:
        try:
            run = bind(model, part, earlier, dry=True)
            if run.demanded is not None:
                verify(model, *run.demanded)
            prepare(run, dry=True)
        except InsituError as error:
            return error
        return None

    # Found before the run: otherwise one prompt that is too long would cost the others a run.
    for one in _failing_beforehand(block, dependence, lost, check):
        failed.append(one)
        lost |= Lost(one.nodes, frozenset(one.invocations))
    part, rest = part_of(block, lost)
    if not part.prompts:
        return _without_values(block, failed)
    with nullcontext() if budget is None else budget.part(rest.nodes):
        try:
            there = [at for at, node in enumerate(rest.nodes) if node in kept]
            run = bind(model, part, earlier, there, rest.numbers)
            _run(run, part)
        except InsituError as error:
            # A limit of the whole job was passed: nothing more of it may run.
            if ends_all(error):
                raise
            failed.append(_of_block(_whole(part, error), rest))
            return _without_values(block, failed)
    failed += [_of_block(one, rest) for one in run.failed]
    saves = {node: run.lines.saves.get(at) for node, at in rest.moved.items()}
    there = {node: holder for node, holder in saves.items() if holder is not None}
    saves = {**_without_values(block, failed).saves, **there}
    outputs = run.outputs
    if outputs is not None:
        outputs = spread_outputs(outputs, rest.numbers, len(block.prompts))
    return RanBlock(saves, failed, run, outputs, rest)


def _run(run: Run, block: JobBlock) -> None:
    """Runs a block, or a part of one. What invocations raise is Insitu's own."""
    location = block.prompts[0].location
    try:
        run_block(run)
    except InsituError as error:
        if isinstance(error, LimitError) and error.location is None:
            raise at_line(error, location) from None
        raise
    except Exception as error:
        raise _explained(error, block, [0]) from error
    run.failed = [
        replace(one, error=_explained(one.error, block, one.blamed)) for one in run.failed
    ]


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


def _of_block(failed: FailedInvocations, rest: Rest) -> FailedInvocations:
    """A failure in a part of a block, with the numbers of the block."""
    return FailedInvocations(
        failed.error,
        [rest.numbers[number] for number in failed.blamed],
        [rest.numbers[number] for number in failed.invocations],
        frozenset(rest.nodes[node] for node in failed.nodes),
    )


def _without_values(block: JobBlock, failed: Sequence[FailedInvocations]) -> RanBlock:
    """A block that has no values, and why."""
    saves: dict[int, Holder] = {}
    for index, row in enumerate(block.graph.rows):
        if row[0] in (SAVE, KEEP):
            saves[index] = cell = Cell()
            why = next((one.error for one in failed if index in one.nodes), None)
            if why is not None:
                cell.content = Missing(f"its run raised {type(why).__name__}.")
    generates = block.procedure == "generate"
    outputs = Outputs(None, [None] * len(block.prompts)) if generates else None
    return RanBlock(saves, failed, outputs=outputs)


def _absent_values(graph: Graph, missing: Callable[[Earlier], Missing | None]) -> dict[int, Any]:
    """Returns the errors for nodes that use values of earlier blocks that are not there.

    Args:
        graph: the graph of a block.
        missing: says why a value is not there, None if it is.
    """
    found: dict[int, InsituError] = {}
    for index, row in enumerate(graph.rows):
        reasons = [reason for item in earlier_of(row) if (reason := missing(item)) is not None]
        if reasons:
            found[index] = NoValueError(
                f"`{expression(graph, index)}` uses a value of an earlier block that has none: "
                f"{reasons[0].reason}",
                graph[index].location,
            )
    return found


def _failing_beforehand(
    block: JobBlock,
    dependence: Dependence,
    lost: Lost,
    check: Callable[[JobBlock], InsituError | None],
) -> list[FailedInvocations]:
    """Returns which invocations of a block cannot run, each with the error that it has alone.

    Args:
        block: the block, which cannot run as it is.
        dependence: which of its nodes and invocations use which.
        lost: what of it is left out already.
        check: returns the faults of a block, as far as they are found before it runs.
    """
    everything = range(len(block.prompts))
    left = [number for number in everything if number not in lost.invocations]
    found: list[FailedInvocations] = []

    def wrong_with(numbers: Collection[int]) -> InsituError | None:
        others = [number for number in everything if number not in numbers]
        gone = dependence.lost(lost.nodes, {*lost.invocations, *others})
        return check(part_of(block, gone)[0])

    def fails(numbers: Collection[int], error: InsituError) -> None:
        gone = dependence.lost((), numbers)
        own = sorted(gone.invocations)
        found.append(FailedInvocations(error, sorted(numbers), own, gone.nodes))

    def within(groups: Sequence[frozenset[int]]) -> None:
        error = wrong_with(frozenset[int]().union(*groups))
        # All of these can be planned together, so none has to be looked at by itself.
        if error is None:
            return
        # In halves: of many prompts a few that fail are found in few trials.
        if len(groups) > 1:
            before, half = len(found), len(groups) // 2
            within(groups[:half])
            within(groups[half:])
            if len(found) == before:  # each can run, and both together cannot
                fails(frozenset[int]().union(*groups), error)
            return
        (group,) = groups
        before = len(found)
        for number in sorted(group) if len(group) > 1 else ():
            # An invocation is tried with those whose values it uses, since it is nothing without
            # them.
            needed = dependence.used_by(number)
            if not any(needed.intersection(one.invocations) for one in found[before:]):
                own = wrong_with(needed)
                if own is not None:
                    fails([number], own)
        if len(found) == before:
            fails(group, error)

    if left:
        within(dependence.groups(left))
    return found
