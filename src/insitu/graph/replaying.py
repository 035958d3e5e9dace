"""Adding what an edit has recorded to a recording, as if its lines stood there."""

from __future__ import annotations

from typing import Any, cast

from insitu.graph.node import EVERY, Address, Graph, Ref, ref
from insitu.graph.operations import READ
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure


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
    moved: list[Ref] = []

    def leaf(item: Any) -> Any:
        return moved[item.index] if type(item) is Ref else item

    for operation, args, kwargs, inputs, nested, mark in graph.rows:
        if operation is READ:
            _, path, kind, call, _ = args
            moved.append(recording.read((number, path, kind, call, step), mark))
            continue
        row_args, row_kwargs = map_structure(leaf, (args, dict(kwargs)))
        sources = tuple(moved[source].index for source in inputs)
        moved.append(ref(len(rows)))
        rows.append((operation, row_args, row_kwargs, sources, nested, mark))
    for read, write in graph.writes.items():
        original = recording.graph.original(moved[read].index)
        recording.graph.writes[original] = moved[write].index
        recording.sites[cast("Address", rows[original][1])] = moved[write]
    for read, skip in graph.skips.items():
        number, path, _, call, step = cast("Address", rows[moved[read].index][1])
        recording.graph.skips = {**recording.graph.skips, moved[read].index: moved[skip].index}
        recording.sites[number, path, "output", call, step] = moved[skip]
    for read, mark in graph.stops.items():
        recording.stop(moved[read], mark)
    whole = recording.graph
    whole.unfused |= {whole.original(moved[index].index) for index in graph.unfused}
    if graph.contexts:
        moving = {moved[index].index: context for index, context in graph.contexts.items()}
        recording.graph.contexts = {**recording.graph.contexts, **moving}
    if step == EVERY:
        recording.graph.repeats = (*recording.graph.repeats, (start, len(rows)))
