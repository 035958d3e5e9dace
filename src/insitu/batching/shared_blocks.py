"""Which invocations of a block share a prompt, and from where on each differs from it.

What an invocation does to a run of the model changes nothing before its first write. So the
prompt is processed once, up to there, and each invocation goes on from a block of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from insitu.batching.arrangement import grouped
from insitu.batching.cost_model import Costs
from insitu.batching.crossings import bounding
from insitu.batching.demand import Chain, Demand, Demands, Work
from insitu.batching.pass_plan import Row, rows_by_level
from insitu.batching.touched_positions import Extents
from insitu.engine.plan import Plan
from insitu.graph.node import SEPARATOR, Address, Place


def may_branch(each: Sequence[Demand], work: Work) -> dict[int, int]:
    """Returns the terms on which invocations may run from a block on, if a forward can begin there.

    By the number of the terms, with the first invocation of each.

    Args:
        each: what the invocations of a block demand.
        work: what the passes are for.
    """
    touched = {address[0] for address in work.written}
    found: dict[int, int] = {}
    for numbers in _of_one_prompt(each):
        terms = each[numbers[0]].terms
        if terms is not None and len(numbers) > 1 and not touched.isdisjoint(numbers):
            found.setdefault(terms.number, numbers[0])
    return found


def find_rows(
    work: Work, demands: Demands, chains: Mapping[int, object], extents: Callable[[], Extents]
) -> list[Row]:
    """Returns the ways through the model that the invocations of a block take.

    Args:
        work: what the passes are for.
        demands: what the invocations demand.
        chains: the blocks at which their runs may begin, by the number of their terms.
        extents: gives which positions are looked at.
    """
    each = demands.each
    reads: list[list[Address]] = [[] for _ in each]
    for address in work.plan.reads:
        reads[address[0]].append(address)
    groups = _of_one_prompt(each)
    # No two prompts are equal, so there is nothing to share.
    if len(groups) == len(each):
        return [_row(number, each[number], own) for number, own in enumerate(reads)]
    writes: list[list[Address]] = [[] for _ in each]
    for address in work.written:
        writes[address[0]].append(address)
    rows: list[Row] = []
    for numbers in groups:
        untouched = [number for number in numbers if not writes[number]]
        touched = [number for number in numbers if writes[number]]
        branches: list[tuple[Row, list[Address]]] = []
        terms = each[numbers[0]].terms
        chain = None if terms is None else chains.get(terms.number)
        shared = len(numbers) > 1 and touched and isinstance(chain, Chain)
        order = work.moments(numbers[0]) if shared else None
        if isinstance(chain, Chain) and order is not None:
            # Where the prompt's run keeps keys and values, functions see to that too.
            inside = any(SEPARATOR in read[1] for number in numbers for read in reads[number])
            branching = _Branching(work.plan, extents(), chain, order, not inside)
            found = (branching.branch(n, each[n], reads[n], writes[n]) for n in touched)
            branches = [branch for branch in found if branch is not None]
            costs = None if demands.always else demands.costs
            # A pass more has a price of its own, which few rows of a small model do not earn back.
            if costs is not None and not _pays(branches, bool(untouched), costs):
                branches = []
        if branches or len(untouched) > 1:
            # Of those that have no other row from the beginning.
            first = untouched[0] if untouched else branches[0][0].invocation
            own = [address for number in untouched for address in reads[number]]
            own.extend(address for _, before in branches for address in before)
            rows.append(_row(first, each[first], own))
            rows.extend(row._replace(origin=first) for row, _ in branches)
        else:
            touched = numbers
        branched = {row.invocation for row, _ in branches}
        rows.extend(
            _row(number, each[number], reads[number])
            for number in touched
            if number not in branched
        )
    return rows


def _of_one_prompt(each: Sequence[Demand]) -> list[list[int]]:
    """The invocations whose prompts are equal, together."""

    def key(number: int) -> Hashable:
        terms, prompt = each[number].terms, each[number].prompt
        return number if terms is None or prompt is None else (terms.number, prompt)

    return [*grouped(range(len(each)), key).values()]


def _row(
    invocation: int, demand: Demand, reads: Sequence[Address], level: int = 0, start: int = 0
) -> Row:
    """A row of an invocation."""
    return Row(invocation, demand.rows, demand.length, reads, level, start, tokens=demand.tokens)


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
        self, number: int, demand: Demand, reads: Sequence[Address], writes: Sequence[Address]
    ) -> tuple[Row, list[Address]] | None:
        """Returns an invocation's own row, and what it reads before; None if it shares nothing."""
        chain = self._chain
        spans: dict[Address, tuple[int, int]] = {}
        for address in reads:
            span = _span(address, self._order)
            if span is None:
                return None
            spans[address] = span
        first = min(spans[address][0] for address in writes)
        # As many blocks as have ended before the first write are the prompt's own.
        level = sum(end <= first for end in self._ends)
        # It differs within the first block.
        if not level:
            return None
        entry = self._ends[level - 1]
        begin = entry if first == entry else entry + 1
        before = [address for address in reads if spans[address][1] < begin]
        after = [address for address in reads if spans[address][0] >= begin]
        # A site that spans the entry would be seen half from each run.
        if len(before) + len(after) < len(reads):
            return None
        # The trial has not shown that a forward that begins there gives this site as a whole one
        # does.
        if any(address[1:4] not in chain.whole for address in after):
            return None
        start = 0
        # Positions before the write do not differ only where attention looks back and the write is
        # handed on as it is.
        if self._tails and len(writes) == 1 and (first == entry or writes[0][1:4] in chain.handed):
            start = self._start(demand.length, writes[0], after)
        return _row(number, demand, after, level, start), before

    def _start(self, length: int, written: Address, after: Sequence[Address]) -> int:
        """From which position on an invocation's run differs, where only these are looked at."""
        part = part_of(written, self._chain.paths)
        start = self._extents.changed_from(self._plan.reads[written], length, part)
        # One position at least: a forward of none is no forward.
        start = min(start, length - 1)
        for address in after:
            if address == written or not start:
                continue
            # Not shown by the trial to be right with the first positions left out.
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


def _pays(branches: Sequence[tuple[Row, Sequence[Address]]], has_base: bool, costs: Costs) -> bool:
    """Whether rows that begin at a block are worth a pass of their own."""
    if not branches:
        return False
    rows = [row for row, _ in branches]
    length = rows[0].length
    apart = costs.time(rows_by_level(rows, costs.blocks), length, length, 0)
    if not has_base:
        apart += costs.work([rows[0].rows] * costs.blocks, length, length, 0)
    together = costs.work([sum(row.rows for row in rows)] * costs.blocks, length, length, 0)
    return apart < together


def _span(address: Address, order: Mapping[Place, int]) -> tuple[int, int] | None:
    """Between which moments a site comes, None if that is not known without a run.

    Of a function in a module's forward it is known of its one call of that.
    """
    inputs, output = bounding(address, "inputs")[1:4], bounding(address, "output")[1:4]
    if inputs not in order or output not in order:
        return None
    # The module is called several times, and which call a function belongs to is not known
    # beforehand.
    if SEPARATOR in address[1] and (inputs[0], "inputs", 1) in order:
        return None
    return order[inputs], order[output]
