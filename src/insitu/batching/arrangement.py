"""How the invocations of a block become passes: what shares one, and in which order they run.

An invocation that uses a value of another runs with it or after it. Of what may run together,
those of like length share a pass; and those that begin where a prompt's shared blocks end run
from there in a batch that grows block by block.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from insitu.batching.cost_model import Costs
from insitu.graph.node import Address


class Run(NamedTuple):
    """One way through the model, for one prompt: a row of a pass, or several.

    Attributes:
        invocation: whose prompt is processed.
        rows: how many rows it has.
        length: how many positions each of them has.
        reads: the sites of which it gives the values.
        level: how many blocks it leaves out, because another run has done them.
        start: how many positions it leaves out likewise.
        base: that other run, or None.
        terms: equal for runs that may share a pass.
    """

    invocation: int
    rows: int
    length: int
    reads: Sequence[Address]
    level: int = 0
    start: int = 0
    base: int | None = None
    terms: Hashable = None


Edges = Mapping[tuple[int, int], bool]
"""Which run uses values of which: the pair of their numbers, the one that is used first, and
whether one pass would do for both."""


class Group(NamedTuple):
    """Runs that share a pass.

    Attributes:
        runs: their numbers.
        start: the positions that all of them leave out.
    """

    runs: Sequence[int]
    start: int = 0


def arrange(runs: Sequence[Run], edges: Edges, costs: Costs, budget: int) -> list[Group] | None:
    """Returns the passes of some runs, in their order.

    None if runs that need each other in both directions do not all begin at the beginning.

    Args:
        runs: the runs.
        edges: which of them use values of which.
        costs: what passes cost.
        budget: how many tokens a pass may have, where it has more than one run.
    """
    groups: list[Group] = []
    for together, mutual in ranks(len(runs), edges):
        if mutual and any(runs[number].level for number in together):
            return None
        alike: dict[Hashable, list[int]] = {}
        for number in together:
            alike.setdefault(runs[number].terms, []).append(number)
        for part in alike.values():
            groups.extend([Group(part)] if mutual else _of_like_terms(runs, part, costs, budget))
    return groups


def _of_like_terms(
    runs: Sequence[Run], numbers: Sequence[int], costs: Costs, budget: int
) -> list[Group]:
    """Divides runs that may share a pass into those that do."""
    whole = [number for number in numbers if not runs[number].level]
    groups = [Group(part) for part in _by_length(runs, whole, costs, budget)]
    lengths: dict[int, list[int]] = {}
    for number in numbers:
        if runs[number].level:
            lengths.setdefault(runs[number].length, []).append(number)
    for part in lengths.values():
        groups.extend(_by_start(runs, part, costs, budget))
    return groups


def rings(edges: Collection[tuple[int, int]], count: int) -> list[int]:
    """Returns for each number the first of those that it needs, and that need it.

    Args:
        edges: pairs of numbers, of which the second needs the first.
        count: how many numbers there are, from 0.
    """
    merged = list(range(count))
    while True:
        try:
            TopologicalSorter(_between(edges, merged)).prepare()
        except CycleError as error:
            cycle = set(error.args[1])
            first = min(cycle)
            merged = [first if number in cycle else number for number in merged]
        else:
            return merged


def _between(edges: Collection[tuple[int, int]], merged: Sequence[int]) -> dict[int, set[int]]:
    """Which rings need which."""
    graph: dict[int, set[int]] = {number: set() for number in sorted(set(merged))}
    for source, target in edges:
        if merged[source] != merged[target]:
            graph[merged[target]].add(merged[source])
    return graph


def ranks(count: int, edges: Edges) -> list[tuple[list[int], bool]]:
    """Returns runs in the order in which they need each other; who may share a pass is together.

    With each, whether some of them need each other in both directions, and so must share it.

    Args:
        count: how many runs there are.
        edges: which of them use values of which.
    """
    merged = rings(edges, count)  # who needs each other in both directions is one
    order = list(TopologicalSorter(_between(edges, merged)).static_order())
    members: dict[int, list[int]] = {}
    for number, at in enumerate(merged):
        members.setdefault(at, []).append(number)
    incoming: dict[int, list[tuple[int, bool]]] = {}
    for (source, target), shares in edges.items():
        if merged[source] != merged[target]:
            incoming.setdefault(merged[target], []).append((merged[source], shares))
    rank: dict[int, int] = {}
    for at in order:
        after = [rank[source] + (not shares) for source, shares in incoming.get(at, ())]
        rank[at] = max(after, default=0)
    ranks: list[tuple[list[int], bool]] = []
    for at in sorted(order, key=rank.__getitem__):
        if rank[at] == len(ranks):
            ranks.append(([], False))
        together, mutual = ranks[rank[at]]
        together.extend(members[at])
        ranks[rank[at]] = (together, mutual or len(members[at]) > 1)
    return ranks


def _by_length(
    runs: Sequence[Run], numbers: list[int], costs: Costs, budget: int
) -> list[list[int]]:
    """Divides runs into batches of like length, the cheapest way."""
    lengths: dict[int, list[int]] = {}
    for number in numbers:
        lengths.setdefault(runs[number].length, []).append(number)
    classes = sorted(lengths.items())
    rows = [sum(runs[number].rows for number in part) for _, part in classes]
    best: list[tuple[float, int]] = [(0.0, 0)]  # up to each class: its cost, and the last cut
    for end in range(1, len(classes) + 1):
        length = classes[end - 1][0]
        found: tuple[float, int] | None = None
        count = 0
        for begin in range(end - 1, -1, -1):
            count += rows[begin]
            if found is not None and count * length > budget:
                break
            cost = best[begin][0] + costs.time([count] * costs.blocks, length, length, 0)
            if found is None or cost < found[0]:
                found = (cost, begin)
        assert found is not None
        best.append(found)
    parts: list[list[int]] = []
    end = len(classes)
    while end:
        begin = best[end][1]
        part = [number for _, same in classes[begin:end] for number in same]
        parts[:0] = _within(runs, part, classes[end - 1][0], budget)
        end = begin
    return parts


def _within(runs: Sequence[Run], numbers: list[int], length: int, budget: int) -> list[list[int]]:
    """Divides runs so that none of the parts has more tokens than the budget."""
    parts: list[list[int]] = [[]]
    tokens = 0
    for number in numbers:
        own = runs[number].rows * length
        if parts[-1] and tokens + own > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(number)
        tokens += own
    return parts


def rows_by_level(runs: Sequence[Run], blocks: int) -> list[int]:
    """Returns how many rows each block that runs has, in a pass that runs enter at their levels.

    Args:
        runs: the runs.
        blocks: how many blocks there are.
    """
    entering = [0] * (blocks + 1)
    for run in runs:
        entering[run.level] += run.rows
    rows: list[int] = []
    count = 0
    for level in range(blocks):
        count += entering[level]
        if count:
            rows.append(count)
    return rows


def _by_start(runs: Sequence[Run], numbers: list[int], costs: Costs, budget: int) -> list[Group]:
    """Divides runs that begin past shared blocks by the positions that they leave out too."""
    length = runs[numbers[0]].length
    starts: dict[int, list[int]] = {}
    for number in numbers:
        starts.setdefault(runs[number].start, []).append(number)
    classes = sorted(starts.items())
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(classes) + 1):
        found: tuple[float, int] | None = None
        part: list[Run] = []
        for begin in range(end - 1, -1, -1):
            start, same = classes[begin]
            part.extend(runs[number] for number in same)
            rows = rows_by_level(part, costs.blocks)
            cost = best[begin][0] + costs.time(rows, length - start, length, 0)
            if found is None or cost < found[0]:
                found = (cost, begin)
        assert found is not None
        best.append(found)
    groups: list[Group] = []
    end = len(classes)
    while end:
        begin = best[end][1]
        start = classes[begin][0]
        part_numbers = [number for _, same in classes[begin:end] for number in same]
        part_numbers.sort(key=lambda number: (runs[number].level, number))
        parts = _within(runs, part_numbers, length - start, budget)
        groups[:0] = [Group(part, start) for part in parts]
        end = begin
    return groups
