"""How rows are divided into passes, and in which order these run.

A row that uses a value of another runs with it or after it. Of those that may run together, rows
of like length share a pass; and those that begin where a prompt's shared blocks end run from there
in a batch that grows block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate
from typing import TypeVar

from insitu.batching.cost_model import Costs
from insitu.batching.pass_plan import Row, rows_by_level

Key = TypeVar("Key", bound=Hashable)

Edges = Mapping[tuple[int, int], bool]
"""Pairs of rows by their numbers, and whether one pass would do for both. The second row of a pair
uses values of the first."""

Group = tuple[list[int], int]
"""The numbers of rows that share a pass, and how many positions all of them leave out."""


class CircleError(Exception):
    """Passes need values of each other.

    Args:
        rows: the numbers of their rows.
    """

    def __init__(self, rows: Collection[int]) -> None:
        super().__init__()
        self.rows = rows


def arrange(
    rows: Sequence[Row],
    keys: Sequence[Hashable],
    edges: Edges,
    costs: Costs | None,
    budget: int,
) -> list[Group] | None:
    """Returns the passes of some rows, in an order in which they can run.

    None if rows that need each other in both directions do not all begin at the beginning.

    Args:
        rows: the rows.
        keys: equal for rows that may share a pass.
        edges: which rows use values of others.
        costs: what passes cost; None if they are divided by the budget alone.
        budget: how many tokens a pass may have, where it has more than one row.

    Raises:
        CircleError: if rows need each other in both directions and may not share a pass.
    """
    divided = partial(_divided, rows, keys, partial(_of_like_terms, rows, costs, budget))
    try:
        return _in_order(divided(edges), edges)
    except CircleError:
        # Two passes, and each has a row that is used in the other: what uses it comes later then.
        return _in_order(divided(dict.fromkeys(edges, False)), edges)


def _divided(
    rows: Sequence[Row],
    keys: Sequence[Hashable],
    of_like_terms: Callable[[list[int]], list[Group]],
    edges: Edges,
) -> list[Group] | None:
    """Divides rows by what they use, by who may share a pass, and by what that costs."""
    groups: list[Group] = []
    for together, mutual in ranks(len(rows), edges):
        # Rows that wait for each other run side by side from the first block on: the planner tries
        # again without rows that begin later.
        if mutual and any(rows[number].first_block for number in together):
            return None
        for part in grouped(sorted(together), keys.__getitem__).values():
            # Rows that need each other must stay in one pass, whatever their lengths cost.
            groups.extend([(part, 0)] if mutual else of_like_terms(part))
    return groups


def _in_order(groups: list[Group] | None, edges: Edges) -> list[Group] | None:
    """The passes in an order in which they can run: as they are, if that is one."""
    if groups is None:
        return None
    home = {number: at for at, (numbers, _) in enumerate(groups) for number in numbers}
    needs = [(home[source], home[target]) for source, target in edges]
    # Nearly always: then the order of the lines stays, which is what `explain` shows.
    if all(source <= target for source, target in needs):
        return groups
    sorter = TopologicalSorter[int](dict.fromkeys(range(len(groups)), ()))
    for source, target in needs:
        if source != target:
            sorter.add(target, source)
    try:
        return [groups[at] for at in sorter.static_order()]
    except CycleError as error:
        circle: set[int] = set(error.args[1])
        raise CircleError([number for at in circle for number in groups[at][0]]) from None


def _of_like_terms(
    rows: Sequence[Row], costs: Costs | None, budget: int, numbers: Sequence[int]
) -> list[Group]:
    """Divides rows that may share a pass into those that do."""
    whole = [number for number in numbers if not rows[number].first_block]
    # Without costs nothing says whether padding or a further call is dearer, so all share.
    parts = [whole] if costs is None else _by_length(rows, whole, costs, budget)
    groups = [(part, 0) for own in parts for part in _within(rows, own, 0, budget)]
    later = [number for number in numbers if rows[number].first_block]
    for part in grouped(later, lambda number: rows[number].length).values():
        assert costs is not None  # of generations no row begins at a block
        groups.extend(_by_start(rows, part, costs, budget))
    return groups


def grouped(numbers: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Returns numbers by what they have in common, in the order in which it comes.

    Args:
        numbers: the numbers.
        key: what each of them has.
    """
    groups: dict[Key, list[int]] = {}
    for number in numbers:
        groups.setdefault(key(number), []).append(number)
    return groups


def rings(edges: Collection[tuple[int, int]], count: int) -> list[int]:
    """Returns for each number the first of those that it needs, and that need it.

    Args:
        edges: pairs of numbers: the second needs the first.
        count: how many numbers there are, from 0.
    """
    merged = list(range(count))
    while True:
        try:
            TopologicalSorter(_between(edges, merged)).prepare()
        except CycleError as error:
            cycle = set(error.args[1])
            first = min(cycle)
            # One ring a round: two that touch are found as one in the next.
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
    """Returns rows in the order in which they need each other; who may share a pass is together.

    With each, whether some of them need each other in both directions, and so must share it.

    Args:
        count: how many rows there are.
        edges: which rows use values of others.
    """
    merged = rings(edges, count)  # who needs each other in both directions is one
    order = list(TopologicalSorter(_between(edges, merged)).static_order())
    members = grouped(range(count), merged.__getitem__)
    incoming: dict[int, list[tuple[int, bool]]] = {}
    for (source, target), shares in edges.items():
        if merged[source] != merged[target]:
            incoming.setdefault(merged[target], []).append((merged[source], shares))
    rank: dict[int, int] = {}
    for at in order:
        # A row that is in time for another may share its pass; one that is not comes a rank later.
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
    rows: Sequence[Row], numbers: Sequence[int], costs: Costs, budget: int
) -> list[list[int]]:
    """Divides rows into batches of like length, the cheapest way."""
    # Rows of one length are never parted here: that would save no padding.
    classes = sorted(grouped(numbers, lambda number: rows[number].length).items())
    sizes = [sum(rows[number].rows for number in part) for _, part in classes]
    before = [0, *accumulate(sizes)]

    def cost(begin: int, end: int) -> float | None:
        length, count = classes[end - 1][0], before[end] - before[begin]
        # One length alone may be over the budget: `_within` divides it, since no cut here could.
        if end - begin > 1 and count * length > budget:
            return None
        # All rows are padded to the longest, and pay for it in every block.
        return costs.time([count] * costs.blocks, length, length, 0)

    parts = _cheapest(len(classes), cost)
    return [[number for _, same in classes[begin:end] for number in same] for begin, end in parts]


def _by_start(
    rows: Sequence[Row], numbers: Sequence[int], costs: Costs, budget: int
) -> list[Group]:
    """Divides rows that begin past shared blocks by the positions that they leave out too."""
    length = rows[numbers[0]].length
    classes = sorted(grouped(numbers, lambda number: rows[number].first_position).items())

    def cost(begin: int, end: int) -> float:
        part = [rows[number] for _, same in classes[begin:end] for number in same]
        counts = rows_by_level(part, costs.blocks)
        return costs.time(counts, length - classes[begin][0], length, 0)

    groups: list[Group] = []
    for begin, end in _cheapest(len(classes), cost):
        start = classes[begin][0]
        part = [number for _, same in classes[begin:end] for number in same]
        # The pass is entered block by block, so that rows that enter first lie first.
        part.sort(key=lambda number: (rows[number].first_block, number))
        groups.extend((own, start) for own in _within(rows, part, start, budget))
    return groups


def _cheapest(count: int, cost: Callable[[int, int], float | None]) -> list[tuple[int, int]]:
    """The cheapest way to cut a row of classes into parts: where each begins and ends.

    Args:
        count: how many classes there are.
        cost: what the classes between two bounds cost as one part; None if that is too large, and
            then a longer one that ends there is too.
    """
    best: list[tuple[float, int]] = [(0.0, 0)]  # up to each class: its cost, and the last cut
    for end in range(1, count + 1):
        found: tuple[float, int] | None = None
        # From the end backwards: once a part is too large, longer ones are too.
        for begin in range(end - 1, -1, -1):
            own = cost(begin, end)
            if own is None:
                break
            if found is None or best[begin][0] + own < found[0]:
                found = (best[begin][0] + own, begin)
        assert found is not None  # one class is never too large
        best.append(found)
    parts: list[tuple[int, int]] = []
    while count:
        begin = best[count][1]
        parts.insert(0, (begin, count))
        count = begin
    return parts


def _within(
    rows: Sequence[Row], numbers: Sequence[int], start: int, budget: int
) -> list[list[int]]:
    """Divides rows so that no part has more tokens than the budget, by like lengths.

    Args:
        rows: the rows.
        numbers: the numbers of those that are divided.
        start: how many positions all of them leave out.
        budget: how many tokens a part may have, where it has more than one row.
    """

    def longest(number: int) -> int:
        return rows[number].length + rows[number].tokens

    parts: list[list[int]] = []
    count = 0
    for number in sorted(numbers, key=longest):
        # Sorted by length, so that the row at hand is the longest, to which all are padded.
        count += rows[number].rows
        if not parts or count * (longest(number) - start) > budget:
            parts.append([])
            count = rows[number].rows
        parts[-1].append(number)
    return parts
