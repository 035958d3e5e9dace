"""What is lost if a node or an invocation fails: all that uses something of it, and nothing else.

An invocation uses what is written into its run. A node that fails takes the invocation in whose
`with` its line stands; a line outside of them takes what is computed of it, and the invocations
into which that is written.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from insitu.graph.node import Graph, Site
from insitu.graph.operations import BACKWARD, GRAD, READ
from insitu.runtime.gradient_binding import bound_to


@dataclass(frozen=True, slots=True)
class Lost:
    """What has no value.

    Attributes:
        nodes: the nodes.
        invocations: the invocations: all nodes that use something of them are among the nodes.
    """

    nodes: frozenset[int] = frozenset()
    invocations: frozenset[int] = frozenset()


class Dependence:
    """Which nodes and invocations of a graph use which.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        rows = graph.rows
        grads = [index for index, row in enumerate(rows) if row[0] is GRAD]
        backwards = [index for index, row in enumerate(rows) if row[0] is BACKWARD]
        self._passes: dict[int, int] = {}  # the backward pass of each gradient
        for backward, found in (bound_to(graph, grads, backwards) if grads else {}).items():
            self._passes.update(dict.fromkeys(found, backward))
        self._own: list[frozenset[int]] = []
        for _ in range(2):  # a pass may be recorded after gradients of it
            before, self._own = self._own, []
            for index in range(len(rows)):
                self._own.append(self._read_by(index, before))

    def _read_by(self, index: int, before: Sequence[frozenset[int]]) -> frozenset[int]:
        """The invocations whose sites a node is computed of."""
        operation, args, _, inputs, *_ = self._graph.rows[index]
        if operation is READ:
            return frozenset([Site(*args).invocation])
        found = frozenset[int]().union(*(self._own[source] for source in inputs))
        return found | before[self._passes[index]] if before and index in self._passes else found

    def invocations(self, nodes: Collection[int]) -> frozenset[int]:
        """Returns the invocations whose sites some nodes are computed of."""
        return frozenset[int]().union(*(self._own[node] for node in nodes))

    def scope(self, node: int) -> int | None:
        """Returns the invocation in whose `with` the line of a node stands, None if in none.

        Args:
            node: the node.
        """
        for number, first, end in self._graph.scopes:
            if first <= node < end:
                return number
        return None

    def blamed(self, nodes: Collection[int], invocations: Collection[int]) -> Collection[int]:
        """Returns the invocations that one failure is of; none for a line outside of them.

        Args:
            nodes: the nodes one of which has failed; none where the model has.
            invocations: those of the pass in which it was.
        """
        if len(nodes) != 1:
            return invocations
        (node,) = nodes
        number = self.scope(node)
        return [] if number is None else [number]

    def lost_by(self, nodes: Collection[int], invocations: Collection[int]) -> Lost:
        """Returns what has no value because of one failure.

        Args:
            nodes: as of `blamed`.
            invocations: likewise.
        """
        return self.lost(nodes, self.blamed(nodes, invocations))

    def lost(self, nodes: Collection[int], invocations: Collection[int]) -> Lost:
        """Returns what has no value because some nodes and invocations have none.

        Args:
            nodes: the nodes.
            invocations: the invocations.
        """
        gone, without = set(nodes), set(invocations)
        graph, before = self._graph, (-1, -1)
        while before != (len(gone), len(without)):
            before = len(gone), len(without)
            for index, row in enumerate(graph.rows):
                if index not in gone and (
                    not without.isdisjoint(self._own[index])
                    or not gone.isdisjoint(row[3])
                    or self._passes.get(index) in gone
                ):
                    gone.add(index)
            for read, made in (*graph.writes.items(), *graph.skips.items()):
                if made in gone:
                    without |= self._own[read]
        return Lost(frozenset(gone), frozenset(without))
