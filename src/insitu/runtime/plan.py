"""Which nodes of a graph can run at which moment of the run.

A node can run once everything that arrives at the sites that it depends on has arrived. Nodes
that depend on the same set of sites run together, in the order of their lines, so the plan keeps
one group for each such set. A set of sites is written as an integer with a bit for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from insitu.graph.node import Address, Graph
from insitu.graph.operations import READ

NO_WRITES: Mapping[int, int] = {}


@dataclass(slots=True, eq=False)
class Plan:
    """What of a graph runs when, and how long its values live.

    Attributes:
        reads: the index of the node that reads it, for each site by its address, in the order of
            their bits.
        bits: the bit of the site that a node reads, by the node's index.
        groups: node indices in the order of their lines, for each set of sites.
        uses: how many times each node's value is asked for, by the run or by the user.
        writes: for each site that is written, the node that makes what the model gets there, by
            the index of the node that reads what arrives.
        needs: the set of sites that each node depends on.
        held: for each set of sites, the nodes whose values wait for sites that are not in it.
    """

    reads: dict[Address, int]
    bits: dict[int, int]
    groups: dict[int, list[int]]
    uses: list[int]
    writes: Mapping[int, int]
    needs: list[int]
    held: dict[int, list[int]]


def make_plan(
    graph: Graph, saves: Mapping[int, object], writes: Mapping[int, int] = NO_WRITES
) -> Plan:
    """Returns the plan of a graph.

    Args:
        graph: what is to be done. A site is read by at most one of its nodes.
        saves: holds the indices of the nodes whose values the user keeps.
        writes: the last write of each site that is written, by the index of its read.
    """
    reads: dict[Address, int] = {}
    bits: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    held: dict[int, list[int]] = {}
    rows = graph.rows
    uses = [0] * len(rows)
    needs = [0] * len(rows)
    for index, (operation, args, _, inputs, _, _) in enumerate(rows):
        if len(inputs) == 1:
            source = inputs[0]
            uses[source] += 1
            need = needs[source]
        elif operation is READ:
            needs[index] = bits[index] = 1 << len(reads)
            reads[args] = index  # pyright: ignore[reportArgumentType]
            continue
        else:
            need = 0
            for source in inputs:
                need |= needs[source]
                uses[source] += 1
            for source in inputs:
                if needs[source] != need:
                    held.setdefault(needs[source], []).append(source)
        needs[index] = need
        if need in groups:
            groups[need].append(index)
        else:
            groups[need] = [index]
    for index in saves:
        uses[index] += 1
    for index in writes.values():
        uses[index] += 1
    return Plan(reads, bits, groups, uses, writes, needs, held)
