"""What goes with a node or an invocation that fails: all that uses it, and nothing else.

An invocation uses the values that are written into its run. A node that fails takes the invocation
in whose `with` its line stands; a line outside of them takes the values computed of it, and the
invocations into which these are written.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from insitu.engine.gradient_binding import bound_to
from insitu.graph.node import Graph
from insitu.graph.operations import BACKWARD, GRAD, READ


@dataclass(frozen=True, slots=True)
class Lost:
    """What has no value.

    Attributes:
        nodes: the nodes.
        invocations: the invocations: all nodes that use something of them are among the nodes.
    """

    nodes: frozenset[int] = frozenset()
    invocations: frozenset[int] = frozenset()

    def __or__(self, other: Lost) -> Lost:
        return Lost(self.nodes | other.nodes, self.invocations | other.invocations)


class Dependence:
    """Which nodes and invocations of a graph use which.

    Args:
        graph: the graph.

    Attributes:
        passes: the backward pass of each node that stands for a gradient, by that node.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        rows = graph.rows
        grads = [index for index, row in enumerate(rows) if row[0] is GRAD]
        backwards = [index for index, row in enumerate(rows) if row[0] is BACKWARD]
        self.passes: dict[int, int] = {}
        bound = bound_to(graph, grads, backwards) if grads and backwards else {}
        for backward, found in bound.items():
            self.passes.update(dict.fromkeys(found, backward))
        everybody = {row[1][0] for row in rows if row[0] is READ}
        # A block of one prompt has no `with` for it.
        alone = not graph.scopes and len(everybody) == 1
        self._only: int | None = everybody.pop() if alone else None
        read_by = self._own = graph.invocations()
        if self.passes:  # a gradient is computed of all that its pass is, recorded before or after
            self._own = list[frozenset[int]]()
            for index, row in enumerate(rows):
                found = read_by[index].union(*(self._own[source] for source in row[3]))
                backward = self.passes.get(index)
                self._own.append(found if backward is None else found | read_by[backward])

    def invocations(self, nodes: Collection[int]) -> frozenset[int]:
        """Returns the invocations whose sites some nodes are computed of."""
        return frozenset[int]().union(*(self._own[node] for node in nodes))

    def used_by(self, number: int) -> frozenset[int]:
        """Returns an invocation with all whose values go into its run.

        Args:
            number: the invocation.
        """
        graph, found, before = self._graph, {number}, 0
        while before != len(found):
            before = len(found)
            for read, made in (*graph.writes.items(), *graph.skips.items()):
                if not found.isdisjoint(self._own[read]):
                    found |= self._own[made]
        return frozenset(found)

    def groups(self, numbers: Collection[int]) -> list[frozenset[int]]:
        """Returns invocations in groups that have nothing to do with each other.

        Args:
            numbers: the invocations.
        """
        group = {number: frozenset([number]) for number in numbers}
        graph = self._graph
        written = (*graph.writes.items(), *graph.skips.items())
        together = {*self._own, *(self._own[read] | self._own[made] for read, made in written)}
        for one in together:
            own = [group[number] for number in one if number in group]
            whole = frozenset[int]().union(*own)
            group.update(dict.fromkeys(whole, whole))
        return list(dict.fromkeys(group.values()))

    def scope(self, node: int) -> int | None:
        """Returns the invocation in whose `with` the line of a node stands, None if in none.

        Args:
            node: the node.
        """
        for number, first, end in self._graph.scopes:
            if first <= node < end:
                return number
        return self._only

    def scopes(self) -> list[int | None]:
        """Returns what `scope` does, for all nodes."""
        count = len(self._graph)
        found: list[int | None] = [self._only] * count
        free = [*range(count + 1)]  # from where on to look for a node that has none yet
        for number, first, end in self._graph.scopes:  # inner ones come first
            node = first
            while True:
                while node < count and free[node] != node:
                    free[node] = free[min(free[node], count)]
                    node = free[node]
                if node >= min(end, count):
                    break
                found[node] = number
                free[node] = node + 1
        return found

    def blamed(self, nodes: Collection[int], invocations: Collection[int]) -> Collection[int]:
        """Returns the invocations that one failure is of; none for a line outside of them.

        Args:
            nodes: the nodes that may have failed, one of them; none where the model has.
            invocations: those of the pass in which it was.
        """
        # Several lines may have failed, so that no line says whose the failure is.
        if len(nodes) != 1:
            return invocations
        (node,) = nodes
        number = self.scope(node)
        return [] if number is None else [number]

    def lost_by(self, nodes: Collection[int], invocations: Collection[int]) -> Lost:
        """Returns what has no value because of one failure.

        Args:
            nodes: as of `blamed`.
            invocations: as of `blamed`.
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
                    or self.passes.get(index) in gone
                ):
                    gone.add(index)
            for read, made in (*graph.writes.items(), *graph.skips.items()):
                if made in gone:
                    without |= self._own[read]
        return Lost(frozenset(gone), frozenset(without))
