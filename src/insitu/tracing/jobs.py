"""Blocks as jobs, and blocks of jobs as runs: what `tracer.job` gives, and `model.run` takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from insitu.batching.procedure import Subject
from insitu.engine.failures import FailedInvocations
from insitu.engine.job import Job
from insitu.engine.job_outcome import Outputs
from insitu.engine.job_parts import Demanded, JobBlock, JobPrompt, Share
from insitu.engine.partial_blocks import Rest
from insitu.graph.cells import Cell, Holder
from insitu.graph.errors import BlockError, JobError
from insitu.graph.location import here
from insitu.graph.location import mark as here_mark
from insitu.graph.node import Carried, Earlier, Graph
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.recording import Recording
from insitu.graph.renumbering import exchanged
from insitu.graph.shapes import fake_value
from insitu.graph.structure import map_structure
from insitu.tracing.graph_check import check_graph
from insitu.tracing.run import HeldLines, RecordedBlock, Run
from insitu.tracing.site_shapes import SiteShapes


def job_of(model: Subject, blocks: Sequence[RecordedBlock], renames: bool = False) -> Job:
    """Returns the job of some blocks.

    Args:
        model: their model.
        blocks: the blocks, in the order in which they run.
        renames: whether a second value of a name gets another, as its own does not matter.

    Raises:
        BlockError: if a block has no prompt, or uses values of a block that is not among these.
        JobError: if two values have one name, and are not renamed.
    """
    lent: dict[int, Earlier] = {}  # by the cell in which a value waits
    names: set[str] = set()
    made: list[JobBlock] = []
    for number, block in enumerate(blocks):
        run, recording = block.recorded(), block.recording
        procedure = run.procedure
        if not run.requests:
            raise BlockError(
                "The block has no prompt: give it one, or write `with tracer.invoke(prompt):`.",
                here(),
            )
        graph = _sendable(recording.graph, lent) if recording.carried else recording.graph
        made.append(
            JobBlock(
                procedure.name,
                procedure.given,
                [procedure.prompt(request) for request in run.requests],
                graph,
                _named(recording, names, renames),
                _demanded(run),
                recording.casts,
                recording.dtype,
            )
        )
        for node, cell in recording.lent.items():
            # By identity: a cell is put where its value will be, and equals nothing.
            lent[id(cell)] = Earlier(number, node)
    return Job(model.described, made)


def _demanded(run: Run) -> Demanded | None:
    """Which prompts have the options that values of a block take."""
    if run.demanded is None:
        return None
    options, mark = run.demanded
    have = [run.procedure.demanding(request, options) is request for request in run.requests]
    return Demanded(options, mark, [number for number, has in enumerate(have) if has])


def _named(recording: Recording, names: set[str], renames: bool) -> dict[int, str]:
    """The names of a block's saved values: those that were given, and the number of each other."""
    graph, given = recording.graph, recording.names
    found: dict[int, str] = {}
    for index, row in enumerate(graph.rows):
        # Values that only later blocks use have no name, and are no results.
        if row[0] not in (SAVE, KEEP) or index in recording.lent:
            continue
        name = given.get(index, str(len(names)))
        if name in names and renames:
            name = str(len(names))
        if name in names:
            raise JobError(
                f"Another value of the session is saved as {name!r}: give each its own name.",
                graph[index].location,
            )
        names.add(name)
        found[index] = name
    return found


def _sendable(graph: Graph, lent: Mapping[int, Earlier]) -> Graph:
    """A graph with the places of values of earlier blocks where it has the values."""

    def leaf(item: Any) -> Any:
        if type(item) is not Carried:
            return item
        if id(item.cell) not in lent:
            raise BlockError(
                "The block uses values of earlier blocks of its session, so it is no job by "
                "itself: `session.job` is one.",
                here(),
            )
        return lent[id(item.cell)]

    return exchanged(graph, leaf)


@dataclass(slots=True, eq=False)
class RanBlock:
    """What a block of a job gives: for the results, and for the blocks after it.

    Attributes:
        saves: where the values are that it saves, by the node.
        failed: what failed in it.
        run: what has run of it, None if nothing has.
        outputs: what its generation returned, None for a trace.
        rest: what has run of it, if something was left out.
    """

    saves: Mapping[int, Holder]
    failed: Sequence[FailedInvocations]
    run: Run | None = None
    outputs: Outputs | None = None
    rest: Rest | None = None

    def fake(self, index: int) -> Any:
        """Returns the value of a node with fake tensors.

        Args:
            index: the node.
        """
        assert self.run is not None  # nobody has the value of a block that has not run
        return fake_value(self.run.lines, index if self.rest is None else self.rest.moved[index])

    def output_of(self, share: Share) -> Any:
        """Returns what one call on the invocations of one of the jobs of a block would return.

        Args:
            share: what of the block is of that job.
        """
        outputs, run = self.outputs, self.run
        if outputs is None or run is None or share.count == len(outputs.each):
            return None if outputs is None else outputs.whole
        numbers = range(share.first, share.first + share.count)
        each = [outputs.each[number] for number in numbers]
        if any(one is None for one in each):
            return None
        own = numbers if self.rest is None else map(self.rest.numbers.index, numbers)
        return run.procedure.whole(each, [run.requests[at] for at in own])


def bind(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[RanBlock],
    kept: Collection[int] = (),
    numbers: Sequence[int] | None = None,
    dry: bool = False,
) -> Run:
    """Makes a block of a job ready to run.

    Args:
        model: the model.
        block: the block, or a part of one.
        earlier: the blocks before it, whose values it may use.
        kept: the nodes whose values later blocks use.
        numbers: the numbers that its invocations have in the block, if it is a part of one.
        dry: whether it will not run.

    Raises:
        InsituError: if the model cannot take its options or prompts, or lacks what its graph names.
    """
    mark = next((one.mark for one in block.prompts if one.mark is not None), here_mark())
    procedure = model.procedure(block.procedure, block.options, mark, dry)
    requests = [procedure.received(_copied(prompt)) for prompt in block.prompts]
    graph, demanded = block.graph, None
    if block.demanded is not None:
        options, line, prompts = block.demanded
        demanded = options, line
        for number in prompts:
            requests[number] = procedure.demanding(requests[number], options)
    check_graph(graph, model.modules, requests, procedure)

    def leaf(item: Any) -> Any:
        if type(item) is not Earlier:
            return item
        before = earlier[item.block]
        return Carried(before.saves[item.node], lambda: before.fake(item.node))

    # Only nested arguments can hold a value of another block.
    if any(row[4] for row in graph.rows):
        graph = exchanged(graph, leaf)
    saves: dict[int, Holder] = {
        index: Cell() for index, row in enumerate(graph.rows) if row[0] in (SAVE, KEEP)
    }
    lines = HeldLines(
        graph,
        saves,
        block.casts,
        block.dtype,
        SiteShapes(model, procedure, requests, graph),
        block.saves,
        len(earlier) + 1,
        kept,
        saves.keys() - block.saves.keys(),
        numbers,
    )
    return Run(model, procedure, lines, requests, demanded)


def _copied(prompt: JobPrompt) -> JobPrompt:
    """A prompt into which the model may write, and the job stays as it was."""

    def leaf(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        # A tensor that is trained must stay itself, or its gradient would be that of a copy.
        return item if item.requires_grad else item.clone()

    ids, mask, args, kwargs = map_structure(
        leaf, (prompt.ids, prompt.mask, prompt.args, dict(prompt.kwargs))
    )
    return replace(prompt, ids=ids, mask=mask, args=args, kwargs=kwargs)
