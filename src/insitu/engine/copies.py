"""Which writes in place need no copy of their own: those that go on with that of an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from insitu.graph.node import Graph
from insitu.graph.operations import PUT, PUT_INTO, PUT_INTO_TENSOR, Operation
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
    last = [-1] * len(rows)  # the last node that uses a value or what may be a view of it
    late = [0] * len(rows)  # all sites that the users wait for
    writes = [0] * len(rows)  # how many writes begin with a value
    for given in (*graph.writes.values(), *graph.skips.values()):
        last[given] = len(rows)  # the model, which comes after all nodes
    for index in range(len(rows) - 1, -1, -1):
        operation, _, _, inputs, _, _ = rows[index]
        for place, source in enumerate(inputs):
            if operation is PUT and not place:
                writes[source] += 1
                continue  # the write itself, which may be the one that goes on with the copy
            last[source] = max(last[source], index)
            late[source] |= needs[index]
            if operation is not PUT and may_be_view(operation):
                last[source] = max(last[source], last[index])
                late[source] |= late[index]
    found: dict[int, Operation] = {}
    for index, (operation, args, _, inputs, _, _) in enumerate(rows):
        if operation is not PUT or rows[inputs[0]][0] is not PUT or writes[inputs[0]] > 1:
            continue
        if last[inputs[0]] < index and not late[inputs[0]] & ~needs[index]:
            before: tuple[Any, ...] = rows[inputs[0]][1]
            alike = _entry(before[1]) == _entry(args[1])
            found[index] = PUT_INTO if alike else PUT_INTO_TENSOR
    return found


def _entry(steps: Sequence[Step]) -> list[Any]:
    """The keys that may lead to an entry of a structure, and to the tensor that was copied."""
    keys = [others[0] if len(others) == 1 else None for _, _, others, _ in steps]
    return list(takewhile(lambda key: isinstance(key, int | str), keys))
