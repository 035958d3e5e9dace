"""Which writes in place need no copy of their own: those that go on with that of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from insitu.graph.node import Graph, Ref
from insitu.graph.operations import ATTRIBUTE, GETITEM, PUT, Operation, put_into
from insitu.graph.put import Step
from insitu.graph.view_operations import may_be_view


def reusable(graph: Graph, needs: Sequence[int]) -> dict[int, Operation]:
    """Returns the `put` nodes that may write into the copy that an earlier `put` has made.

    Each is given with the operation that does so.

    That is so where nothing that runs later uses the earlier value or a view of it. Without it,
    1,024 writes at one site would copy 1,024 times. Where autograd records, a run copies anyway.

    Args:
        graph: the nodes, and what the run hands over to the model.
        needs: the sites that each node waits for, as bits.
    """
    rows = graph.rows
    last = [-1] * len(rows)  # the last node that uses a value or what may share memory with it
    late = [0] * len(rows)  # all sites that the users wait for
    begun: dict[int, list[int]] = {}  # the writes that begin with a value
    found: dict[int, Operation] = {}
    for given in (*graph.writes.values(), *graph.skips.values()):
        last[given] = len(rows)  # the model, which comes after all nodes
    for index in range(len(rows) - 1, -1, -1):
        operation, args, _, inputs, _, _ = rows[index]
        writes = begun.pop(index, [])
        if operation is PUT and len(writes) == 1:
            write = writes[0]  # this alone may go on with the copy, once nobody else uses it
            if last[index] < write and not late[index] & ~needs[write]:
                found[write] = put_into(_same(args[1], rows[write][1][1]))
        for write in writes:  # for what this value was made of, it is a user like any other
            last[index] = max(last[index], write, last[write])  # it hands on the other entries
            late[index] |= needs[write] | late[write]
        for place, source in enumerate(inputs):
            if operation is PUT and not place:
                begun.setdefault(source, []).append(index)
                continue
            last[source] = max(last[source], index)
            late[source] |= needs[index]
            if may_be_view(operation):
                last[source] = max(last[source], last[index])
                late[source] |= late[index]
    return found


def _same(before: Sequence[Step], steps: Sequence[Step]) -> int:
    """How many of the first steps of two writes certainly take the same entry of a structure."""
    entries = zip(map(_entry, before), map(_entry, steps), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1] is not None, entries))


def _entry(step: Step) -> tuple[str, Any] | None:
    """What a step may take out of a structure; None if it leads to a part of a tensor."""
    name, place, others, _ = step
    if name not in (ATTRIBUTE.name, GETITEM.name) or place != 0:
        return None
    return (name, others[0]) if type(others[0]) in (int, str, slice, Ref) else None
