"""Which invocations of a block share a prompt, and from where on each differs from it.

What an invocation does to a run of the model changes nothing before its first write. So the
prompt is processed once, up to there, and each invocation goes on from a block of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from insitu.batching.arrangement import Edges, Run, rows_by_level
from insitu.batching.cost_model import Costs
from insitu.batching.touched_positions import Extents
from insitu.graph.node import SEPARATOR, Address, Graph, Kind, Place
from insitu.graph.operations import READ
from insitu.runtime.order import handed_over, needed
from insitu.runtime.plan import Plan, written

Moments = Callable[[int], "Mapping[Place, int] | None"]
"""When the sites of an invocation come, or None if that is not known without a run."""


class Chain(NamedTuple):
    """Blocks that a model runs one after the other, each on what the one before it returned.

    Attributes:
        paths: their paths.
        whole: the places at which what arrives has a row for each row of the blocks' batch.
        tails: those of them at which positions can be left out too.
        handed: those of them at which a block is given just what the one before it returned.
    """

    paths: Sequence[str]
    whole: frozenset[Place]
    tails: frozenset[Place]
    handed: frozenset[Place]


class Given(NamedTuple):
    """What an invocation is given, as far as it matters here.

    Attributes:
        key: equal for equal prompts that may share what they have in common.
        rows: how many rows it has.
        length: how many positions each of them has.
        terms: equal for invocations that may share a pass.
    """

    key: Hashable
    rows: int
    length: int
    terms: Hashable = None

    def run(self, invocation: int, reads: Sequence[Address], level: int = 0, start: int = 0) -> Run:
        """Returns a run of it: see `Run`."""
        return Run(invocation, self.rows, self.length, reads, level, start, None, self.terms)


def find_runs(
    graph: Graph,
    plan: Plan,
    given: Sequence[Given],
    chain: Callable[[int], Chain | None],
    moments: Moments,
    costs: Costs | None,
) -> tuple[list[Run], Edges]:
    """Returns the ways through the model that the invocations of a block take.

    Args:
        graph: what is to be done.
        plan: its plan.
        given: what each invocation is given.
        chain: gives the model's blocks for an invocation, None if its runs cannot begin at a
            block. It is asked only if there is something to share.
        moments: when sites come.
        costs: what passes cost; None to share whatever can be shared.
    """
    reads: list[list[Address]] = [[] for _ in given]
    for address in plan.reads:
        reads[address[0]].append(address)
    same: dict[Hashable, list[int]] = {}
    for number, prompt in enumerate(given):
        same.setdefault(prompt.key, []).append(number)
    if len(same) == len(given):
        runs = [prompt.run(number, reads[number]) for number, prompt in enumerate(given)]
        return runs, _edges(graph, plan, runs, moments)
    writes: list[list[Address]] = [[] for _ in given]
    for address in written(graph, plan):
        writes[address[0]].append(address)
    runs: list[Run] = []
    extents = cache(partial(Extents, graph))  # made where something may be shared, and once
    for numbers in same.values():
        untouched = [number for number in numbers if not writes[number]]
        touched = [number for number in numbers if writes[number]]
        branches: list[tuple[Run, list[Address]]] = []
        known = chain(numbers[0]) if touched and len(numbers) > 1 else None
        order = moments(numbers[0]) if known is not None else None
        if known is not None and order is not None:
            # Where the prompt's run keeps keys and values, functions see to that too.
            inside = any(SEPARATOR in read[1] for number in numbers for read in reads[number])
            branching = _Branching(plan, extents(), known, order, not inside)
            found = (branching.branch(n, given[n], reads[n], writes[n]) for n in touched)
            branches = [branch for branch in found if branch is not None]
            if costs is not None and not _pays(branches, bool(untouched), costs):
                branches = []
        if branches or len(untouched) > 1:
            base = len(runs)
            first = numbers[0]
            own = [address for number in untouched for address in reads[number]]
            own.extend(address for _, before in branches for address in before)
            runs.append(given[first].run(first, own))
            runs.extend(run._replace(base=base) for run, _ in branches)
        else:
            touched = numbers
        branched = {run.invocation for run, _ in branches}
        runs.extend(
            given[number].run(number, reads[number]) for number in touched if number not in branched
        )
    return runs, _edges(graph, plan, runs, moments)


class _Branching:
    """Finds where invocations of one prompt leave it.

    Args:
        plan: the plan.
        extents: which positions are looked at.
        chain: the blocks.
        order: when sites come.
        tails: whether positions may be left out too.
    """

    def __init__(
        self,
        plan: Plan,
        extents: Extents,
        chain: Chain,
        order: Mapping[Place, int],
        tails: bool,
    ) -> None:
        self._tails = tails
        self._plan = plan
        self._extents = extents
        self._chain = chain
        self._order = order
        self._ends = [order[path, "output", 0] for path in chain.paths]

    def branch(
        self, number: int, given: Given, reads: Sequence[Address], writes: Sequence[Address]
    ) -> tuple[Run, list[Address]] | None:
        """Returns an invocation's own run, and what it reads before; None if it shares nothing."""
        chain = self._chain
        spans: dict[Address, tuple[int, int]] = {}
        for address in reads:
            span = _span(address, self._order)
            if span is None:
                return None
            spans[address] = span
        first = min(spans[address][0] for address in writes)
        level = sum(end <= first for end in self._ends)
        if not level:
            return None
        entry = self._ends[level - 1]
        begin = entry if first == entry else entry + 1
        before = [address for address in reads if spans[address][1] < begin]
        after = [address for address in reads if spans[address][0] >= begin]
        if len(before) + len(after) < len(reads):
            return None
        if any(address[1:4] not in chain.whole for address in after):
            return None
        start = 0
        if self._tails and len(writes) == 1 and (first == entry or writes[0][1:4] in chain.handed):
            start = self._start(given.length, writes[0], after)
        return given.run(number, after, level, start), before

    def _start(self, length: int, written: Address, after: Sequence[Address]) -> int:
        """From which position on an invocation's run differs, where only these are looked at."""
        part = part_of(written, self._chain.paths)
        start = self._extents.changed_from(self._plan.reads[written], length, part)
        start = min(start, length - 1)
        for address in after:
            if address == written or not start:
                continue
            if address[1:4] not in self._chain.tails:
                return 0
            looked_at = self._extents.read(
                self._plan.reads[address], length, part_of(address, self._chain.paths)
            )
            if looked_at is None or min(looked_at, default=length) < start:
                return 0
        return start


def part_of(address: Address, blocks: Sequence[str]) -> object:
    """Returns the entry of a value in which positions are looked for; None if it is no structure.

    Args:
        address: where the value arrives.
        blocks: the paths of the model's blocks.
    """
    if address[2] != "output":
        return None
    if not address[1]:
        return "logits"
    return 0 if address[1] in blocks else None


def _pays(branches: Sequence[tuple[Run, Sequence[Address]]], has_base: bool, costs: Costs) -> bool:
    """Whether runs that begin at a block are worth a pass of their own."""
    if not branches:
        return False
    runs = [run for run, _ in branches]
    length = runs[0].length
    rows = rows_by_level(runs, costs.blocks)
    apart = costs.time(rows, length, length, 0)
    if not has_base:
        apart += costs.work([runs[0].rows] * costs.blocks, length, length, 0)
    together = costs.work([sum(run.rows for run in runs)] * costs.blocks, length, length, 0)
    return apart < together


def _edges(graph: Graph, plan: Plan, runs: Sequence[Run], moments: Moments) -> Edges:
    """Which runs use values of which."""
    edges: dict[tuple[int, int], bool] = {
        (run.base, number): False for number, run in enumerate(runs) if run.base is not None
    }
    if not plan.crosses:
        return edges
    home = {address: number for number, run in enumerate(runs) for address in run.reads}
    orders: dict[int, Mapping[Place, int] | None] = {}
    for reads, write in handed_over(plan):
        targets = [graph.rows[read][1] for read in reads if graph.rows[read][0] is READ]
        for target in targets:
            at = home[target]  # pyright: ignore[reportArgumentType]
            for address in needed(plan, plan.reads[target], write):  # pyright: ignore[reportArgumentType]
                source = home[address]
                if source == at:
                    continue
                shares = not (runs[source].level or runs[at].level)
                shares = shares and runs[source].length == runs[at].length
                shares = shares and runs[source].terms == runs[at].terms
                if shares:
                    number = target[0]
                    if number not in orders:
                        orders[number] = moments(number)
                    order = orders[number]
                    if order is not None:
                        here = order.get(_outside(target, "inputs"))
                        there = order.get(_outside(address, "output"))
                        same = address[1:4] == target[1:4]
                        shares = same or here is None or there is None or there <= here
                edges[source, at] = edges.get((source, at), True) and shares
    return edges


def _span(address: Address, order: Mapping[Place, int]) -> tuple[int, int] | None:
    """Between which moments a site comes, None if that is not known without a run.

    Of a function in a module's forward it is known of its one call of that.
    """
    inputs, output = _outside(address, "inputs"), _outside(address, "output")
    if inputs not in order or output not in order:
        return None
    if SEPARATOR in address[1] and (inputs[0], "inputs", 1) in order:
        return None
    return order[inputs], order[output]


def _outside(address: Address, bound: Kind) -> Place:
    """The place of a site; of a function in a module's forward, what bounds its moment."""
    owner, inside, _ = address[1].partition(SEPARATOR)
    return (owner, bound, 0) if inside else address[1:4]
