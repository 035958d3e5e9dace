"""The planner: from what the invocations of a block demand to the passes of its run.

A pure function: nothing is run, no module is looked at, and equal data gives equal passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial

from insitu.batching.arrangement import CircleError, Group, arrange
from insitu.batching.causality import circle_error
from insitu.batching.crossings import Crossing, crossings, in_time, steps_together
from insitu.batching.demand import Chain, Demands, Terms, Work
from insitu.batching.pass_plan import Logits, PassPlan, Row, alone
from insitu.batching.shared_blocks import find_rows, part_of
from insitu.batching.touched_positions import Extents
from insitu.engine.fallback import Fallback
from insitu.graph.node import Place

_NO_CHAINS: Mapping[int, Chain | Fallback] = {}


def plan_passes(work: Work, demands: Demands) -> list[PassPlan]:
    """Returns the passes of a run, in an order in which they can run.

    Args:
        work: what they are for.
        demands: what the invocations demand.

    Raises:
        CausalityError: if invocations need values of each other and cannot share a pass.
        OperationError: if values of every step are used together and their invocations run apart.
    """
    crossing = crossings(work.graph, work.plan)
    extents = cache(partial(Extents, work.graph))
    rows, groups = _arranged(work, demands, demands.chains, crossing, extents)
    if groups is None:  # rows that need each other in both directions do not begin at blocks
        rows, groups = _arranged(work, demands, _NO_CHAINS, crossing, extents)
    assert groups is not None
    return _passes(rows, groups, work, demands, extents)


def _arranged(
    work: Work,
    demands: Demands,
    chains: Mapping[int, Chain | Fallback],
    crossing: Sequence[Crossing],
    extents: Callable[[], Extents],
) -> tuple[list[Row], list[Group] | None]:
    """The rows of a run, and which of them share a pass."""
    rows = find_rows(work, demands, chains, extents)
    keys = [demands.each[row.invocation].key(row.invocation) for row in rows]
    edges = _edges(rows, keys, work, demands, crossing)
    try:
        return rows, arrange(rows, keys, edges, demands.costs, demands.budget)
    except CircleError as error:
        numbers = {rows[number].invocation for number in error.rows}
        raise circle_error(work, crossing, numbers, demands.each) from None


def _edges(
    rows: Sequence[Row],
    keys: Sequence[Hashable],
    work: Work,
    demands: Demands,
    crossing: Sequence[Crossing],
) -> dict[tuple[int, int], bool]:
    """Which rows use values of other rows, and whether one pass would do for both."""
    edges: dict[tuple[int, int], bool] = {}
    # A row that begins at a block needs the run of its prompt that begins at the beginning.
    whole = {row.invocation: at for at, row in enumerate(rows) if not row.first_block}
    for at, row in enumerate(rows):
        if row.origin is not None:
            # Never in one pass: what it begins with has to be there.
            edges[whole[row.origin], at] = False
    last = {row.invocation: at for at, row in enumerate(rows)}
    for one, other in steps_together(work.plan):
        edges[last[one], last[other]] = True
    home = {address: at for at, row in enumerate(rows) for address in row.reads}
    known = cache(work.moments)
    for each in crossing:
        source, at = home[each.source], home[each.target]
        if source == at:
            continue
        shares = keys[source] == keys[at]
        shares = shares and not (rows[source].first_block or rows[at].first_block)
        if demands.costs is not None:  # by which lengths may be parted
            shares = shares and rows[source].length == rows[at].length
        # Two rows may cross at several sites: one that is too late is enough to part them.
        shares = shares and edges.get((source, at), True) and in_time(each, known)
        edges[source, at] = shares
    return edges


def _passes(
    rows: Sequence[Row],
    groups: Sequence[Group],
    work: Work,
    demands: Demands,
    extents: Callable[[], Extents],
) -> list[PassPlan]:
    """What each pass does."""
    leaving: dict[int, tuple[set[int], bool]] = {}  # at which blocks; whether keys and values
    for numbers, start in groups:
        for number in numbers:
            row = rows[number]
            if row.origin is not None:
                blocks, cached = leaving.get(row.origin, (set[int](), False))
                leaving[row.origin] = ({*blocks, row.first_block}, cached or bool(start))
    passes: list[PassPlan] = []
    for numbers, start in groups:
        own = [rows[number] for number in sorted(numbers)]
        own.sort(key=lambda row: row.first_block)
        demand = demands.each[own[0].invocation]
        terms = demand.terms
        # It shares with nobody, for the reason that its demand gives.
        if terms is None:
            passes.append(alone(own[0].invocation, demand, own[0].reads))
            continue
        positions = max(row.length for row in own) - start
        single = PassPlan((*own,), positions, start, terms, None, demand.differentiates)
        left = [leaving.get(row.invocation) for row in own if not row.first_block]
        blocks = frozenset[int]().union(*(found[0] for found in left if found is not None))
        caches = any(found[1] for found in left if found is not None)
        through: Place | None = None
        if blocks or single.first_block:
            last = own[-1].first_block if single.first_block else max(blocks)
            # A pass must not end before the states that others begin with exist; keys and values
            # are those of all blocks.
            through = (demands.blocks[(len(demands.blocks) if caches else last) - 1], "output", 0)
        passes.append(
            single._replace(
                logits=_logits(single, terms, work, demands, extents),
                leaves=blocks,
                caches=caches,
                through=through,
                why=_why(single, terms, bool(blocks), demands),
            )
        )
    return passes


def _why(single: PassPlan, terms: Terms, leaves: bool, demands: Demands) -> str:
    """Why the invocations of a pass share it."""
    if single.rows[0].tokens:
        return "prompts that are generated together" if len(single.rows) > 1 else ""
    if single.first_block:
        last = single.rows[-1].first_block - 1
        up_to = f"blocks {single.first_block - 1}-{last}"
        up_to = up_to if last >= single.first_block else f"block {last}"
        before = f" and before position {single.first_position}" if single.first_position else ""
        return f"like their prompt up to {up_to}{before}"
    if leaves:
        why = "what invocations of one prompt share"
    else:
        why = "one prompt" if len(single.invocations) == 1 else "prompts of like length"
    chain = demands.chains.get(terms.number)
    if isinstance(chain, Fallback):
        why += f"; equal prompts share no blocks: {chain.why}"
    return why


def _logits(
    single: PassPlan,
    terms: Terms,
    work: Work,
    demands: Demands,
    extents: Callable[[], Extents],
) -> Logits | None:
    """Which positions of a pass have to become logits; None for all."""
    head = demands.head
    # Positions are counted from the front here, which padding on the left would move.
    if head is None or terms.side == "left" or single.differentiates:
        return None
    places = frozenset[Place]([("", "output", 0), (head, "output", 0)])
    # If logits cannot be cut out of a batch, they are not for some positions either.
    if not places <= terms.layouts.keys():
        return None
    found: list[Sequence[int]] = []
    for row in single.rows:
        wanted: set[int] = set()
        for address in row.reads:
            # The hidden states before the unembedding are asked for, which would be fewer.
            if address[1:4] in ((head, "input", 0), (head, "inputs", 0)):
                return None
            if address[1:4] not in places:
                continue
            part = part_of(address, demands.blocks)
            looked_at = extents().read(work.plan.reads[address], row.length, part)
            if looked_at is None:
                return None
            wanted.update(position - single.first_position for position in looked_at)
        found.append(tuple(sorted(wanted)))
    # With most positions looked at, picking them costs more than it saves.
    if not 0 < max(map(len, found)) <= single.positions // 2:
        return None
    return Logits(places, tuple(found))
