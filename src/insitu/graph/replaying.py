"""Adding what an edit has recorded to a recording, as if its lines stood there."""

from __future__ import annotations

from typing import cast

from insitu.graph.node import EVERY, Address, Graph, own, ref, rewired
from insitu.graph.operations import READ
from insitu.graph.recording import Recording


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
        own(recording.graph, "skips")[moved[read]] = moved[skip]
        recording.sites[number, path, "output", call, step] = ref(moved[skip])
    for read, mark in graph.stops.items():
        recording.stop(ref(moved[read]), mark)
    for index in graph.unfused:
        original = recording.graph.original(moved[index])
        own(recording.graph, "unfused", set).add(original)
    for index, context in graph.contexts.items():
        own(recording.graph, "contexts")[moved[index]] = context
    if step == EVERY:
        recording.graph.repeats = (*recording.graph.repeats, (start, len(rows)))
