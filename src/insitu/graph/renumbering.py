"""Nodes of one graph put behind those of another, with other numbers for nodes and invocations.

So a part of a graph becomes a graph of its own, several graphs become one, and what an edit has
recorded is recorded in a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from insitu.graph.node import EVERY, Address, Graph, Row, ref, rewired, table_of
from insitu.graph.operations import BACKWARD, GRAD, KEEP, READ
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure

_DIFFERENTIATED = (BACKWARD, GRAD, KEEP)


def add_nodes(
    target: Graph, graph: Graph, kept: Iterable[int], numbers: Mapping[int, int]
) -> dict[int, int]:
    """Puts nodes of a graph behind those that another graph has.

    Args:
        target: the graph that gets them. It is changed.
        graph: the graph that has them.
        kept: their indices, in their order. What a node refers to is among them too.
        numbers: the new number of each invocation that they read from, by the old one.

    Returns:
        The new index of each node, by the old one.
    """
    rows, moved = target.rows, dict[int, int]()
    start = len(rows)

    for index in kept:
        row = graph.rows[index]
        if row[0] is READ:
            number, *place = cast(Address, row[1])
            row = cast(Row, (READ, (numbers[number], *place), *row[2:]))
        else:
            row = rewired(row, moved)
        moved[index] = len(rows)
        rows.append(row)
    _add_fields(target, graph, moved, numbers, start)
    return moved


def exchanged(graph: Graph, leaf: Callable[[Any], Any]) -> Graph:
    """Returns a graph with other things in containers among the arguments of its nodes.

    Values of other blocks stand nowhere else: a node that has one counts as nested.

    Args:
        graph: the graph.
        leaf: what to put in the place of each leaf.
    """
    made = Graph([])
    vars(made).update(vars(graph))
    made.rows = []
    for operation, args, kwargs, inputs, nested, mark in graph.rows:
        if nested:
            args, kwargs = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
        made.rows.append(cast(Row, (operation, args, kwargs, inputs, nested, mark)))
    return made


def replay(recording: Recording, graph: Graph, number: int, step: int) -> None:
    """Adds what an edit has recorded, as if its lines came now.

    Args:
        recording: what it is added to.
        graph: what the edit has recorded.
        number: the invocation that it is to hold in.
        step: the step, or `EVERY`.
    """
    rows = recording.graph.rows
    start = len(rows)
    moved: dict[int, int] = {}
    for index, row in enumerate(graph.rows):
        if row[0] is READ:
            _, path, kind, call, _ = row[1]
            moved[index] = recording.read((number, path, kind, call, step), row[-1]).index
        else:
            moved[index] = len(rows)
            rows.append(rewired(row, moved))
    for read, write in graph.writes.items():
        original = recording.graph.original(moved[read])
        recording.graph.writes[original] = moved[write]
        recording.sites[cast("Address", rows[original][1])] = ref(moved[write])
    for read, skip in graph.skips.items():
        number, path, _, call, step = cast("Address", rows[moved[read]][1])
        table_of(recording.graph, "skips")[moved[read]] = moved[skip]
        recording.sites[number, path, "output", call, step] = ref(moved[skip])
    for read, mark in graph.stops.items():
        recording.stop(ref(moved[read]), mark)
    for index in graph.unfused:
        original = recording.graph.original(moved[index])
        table_of(recording.graph, "unfused", set).add(original)
    for index, context in graph.contexts.items():
        table_of(recording.graph, "contexts")[moved[index]] = context
    if step == EVERY:
        recording.graph.repeats = (*recording.graph.repeats, (start, len(rows)))


def _add_fields(
    target: Graph,
    graph: Graph,
    moved: Mapping[int, int],
    numbers: Mapping[int, int],
    start: int,
) -> None:
    """Adds what a graph says of nodes that were moved."""
    target.writes.update(_pairs(graph.writes, moved))
    for field in ("skips", "after"):
        if found := _pairs(getattr(graph, field), moved):
            table_of(target, field).update(found)
    for field in ("stops", "contexts"):
        for at, value in getattr(graph, field).items():
            if at in moved:
                table_of(target, field)[moved[at]] = value
    for field in ("optional", "unfused"):
        for at in getattr(graph, field):
            if at in moved:
                table_of(target, field, set).add(moved[at])
    if graph.repeats or graph.scopes:
        before = [start]  # how many nodes of the target there are in front of each of the graph's
        for index in range(len(graph)):
            before.append(before[-1] + (index in moved))
        target.repeats = (*target.repeats, *_bounds(graph.repeats, before))
        known = [scope for scope in graph.scopes if scope[0] in numbers]
        found = [(numbers[of], before[first], before[end]) for of, first, end in known]
        target.scopes = [*target.scopes, *(one for one in found if one[1] < one[2])]
    done = (graph.rows[at][0] for at in moved)
    if graph.differentiates and any(operation in _DIFFERENTIATED for operation in done):
        target.differentiates = True


def _pairs(field: Mapping[int, int], moved: Mapping[int, int]) -> dict[int, int]:
    """The entries of a field whose nodes were both moved."""
    pairs = field.items()
    return {moved[one]: moved[other] for one, other in pairs if one in moved and other in moved}


def _bounds(field: Sequence[tuple[int, int]], before: Sequence[int]) -> Sequence[tuple[int, int]]:
    """Bounds between nodes, without those between which no node was moved."""
    found = [(before[first], before[end]) for first, end in field]
    return [(first, end) for first, end in found if first < end]
