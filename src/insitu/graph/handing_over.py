"""What writes in place hand over to the model: where their bases stand, and whose they are.

A value of one invocation may be written into in another. That is for the lines that follow, and
the run of the first knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Graph, table_of
from insitu.graph.operations import GETITEM, GRAD, PUT, READ, SKIP, WRITE
from insitu.graph.put import Step


class HandingOver:
    """Finds where the bases of a recording stand.

    Args:
        graph: the recorded experiment.
        first: the base that each write in place has changed, by its node.
    """

    def __init__(self, graph: Graph, first: Mapping[int, int]) -> None:
        self._graph = graph
        self._first = first
        self._borrowed: dict[int, set[Any]] = {}  # by the base: which entries were written into

    def place(
        self, base: int, steps: Sequence[Step], writer: int | None, mark: Mark
    ) -> tuple[dict[int, int], int] | None:
        """Returns where the model is given what a write in place makes of a base.

        Args:
            base: the base.
            steps: the views that lead to the part that is written into.
            writer: the invocation in which that stands; None for whichever it writes into.
            mark: the user's line.

        Returns:
            The table of the graph that says so, `writes` or `skips`, and the place in it. None if
            the base stands nowhere, if a later line has put something else there, or if the write
            is another invocation's.

        Raises:
            OperationError: if another invocation has written into it before.
        """
        rows, node = self._graph.rows, base
        while rows[node][0] in (PUT, WRITE):
            node = rows[node][3][0]
        operation, args, _, inputs, _, _ = rows[node]
        if operation is SKIP:
            given, place = table_of(self._graph, "skips"), inputs[0]
            args = rows[place][1]
        elif operation in (READ, GRAD):
            given, place = self._graph.writes, node
        else:
            return None
        now = given.get(place, node)
        if self._first.get(now, now) != base:
            return None
        if operation is not GRAD and writer is not None and args[0] != writer:
            keys = [others[0] for name, _, others, _ in steps[:1] if name == GETITEM.name]
            entries = [key if isinstance(key, int | str) else None for key in keys or [None]]
            self._borrowed.setdefault(base, set()).update(entries)
            return None
        if base in self._borrowed:
            raise _refusal(mark)
        return given, place

    @property
    def borrows(self) -> bool:
        """Whether another invocation has written into any base."""
        return bool(self._borrowed)

    def is_borrowed(self, base: int) -> bool:
        """Returns whether another invocation has written into a base."""
        return base in self._borrowed

    def check_entry(self, base: int, key: Any, mark: Mark) -> None:
        """Raises if assigning an entry of a structure would take values that are not the model's.

        Args:
            base: the structure.
            key: the entry.
            mark: the user's line.

        Raises:
            OperationError: if another invocation has written into another entry.
        """
        if self._borrowed.get(base, set()) - {key}:
            raise _refusal(mark)


def _refusal(mark: Mark) -> OperationError:
    return OperationError(
        "Another invocation has written into this value before, for its own lines: write there "
        "into a `.clone()` of it.",
        Location(*mark),
    )
