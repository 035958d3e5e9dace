"""Jobs of blocks: what `tracer.job` and `session.job` give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from insitu.batching.procedure import Subject
from insitu.engine.job import Job
from insitu.engine.job_parts import Demanded, JobBlock
from insitu.graph.errors import BlockError, JobError
from insitu.graph.location import here
from insitu.graph.node import Carried, Earlier, Graph, Row
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure
from insitu.tracing.run import RecordedBlock, Run


def job_of(model: Subject, blocks: Sequence[RecordedBlock]) -> Job:
    """Returns the job of some blocks.

    Args:
        model: their model.
        blocks: the blocks, in the order in which they run.

    Raises:
        BlockError: if a block has no prompt, or uses values of a block that is not among these.
        JobError: if two values have one name.
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
                _named(recording, names),
                _demanded(run),
                recording.casts,
                recording.dtype,
            )
        )
        for node, cell in recording.lent.items():
            lent[id(cell)] = Earlier(number, node)
    return Job(model.described, made)


def _demanded(run: Run) -> Demanded | None:
    """Which prompts have the options that values of a block take."""
    if run.demanded is None:
        return None
    options, mark = run.demanded
    have = [run.procedure.demanding(request, options) is request for request in run.requests]
    return Demanded(options, mark, [number for number, has in enumerate(have) if has])


def _named(recording: Recording, names: set[str]) -> dict[int, str]:
    """The names of a block's saved values: those that were given, and the number of each other."""
    graph, given = recording.graph, recording.names
    found: dict[int, str] = {}
    for index, row in enumerate(graph.rows):
        if row[0] not in (SAVE, KEEP) or index in recording.lent:
            continue
        name = given.get(index, str(len(names)))
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


def exchanged(graph: Graph, leaf: Any) -> Graph:
    """Returns a graph with other things among the arguments of its nodes.

    Args:
        graph: the graph.
        leaf: what to put in the place of each leaf.
    """
    made = Graph([])
    vars(made).update(vars(graph))
    made.rows = []
    for row in graph.rows:
        operation, args, kwargs, inputs, nested, mark = row
        if nested:  # what is looked for stands in no other row
            args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
        made.rows.append(cast(Row, (operation, args, kwargs, inputs, nested, mark)))
    return made
