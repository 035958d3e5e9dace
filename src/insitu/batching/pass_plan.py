"""A pass as plain data: its rows, where each begins, what they give, and on which terms it runs.

The planner makes them, a procedure of `models/` turns each into a call of the model, and
`tracer.plan` tells the user what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from insitu.batching.demand import Demand, Terms
from insitu.engine.fallback import Fallback
from insitu.graph.node import Address, Place


class Row(NamedTuple):
    """The way of one prompt through the model: a row of a batch, or several.

    Attributes:
        invocation: whose prompt it is.
        rows: how many rows the prompt has.
        length: how many positions each of them has.
        reads: the sites whose values it gives. Some are of other invocations, if their
            prompts are equal.
        first_block: how many blocks it leaves out, because another row has run them.
        first_position: how many positions it leaves out for the same reason.
        origin: the invocation of that other row, which begins at the model's beginning.
        tokens: how many tokens it may get at most, where it is generated.
    """

    invocation: int
    rows: int
    length: int
    reads: Sequence[Address]
    first_block: int = 0
    first_position: int = 0
    origin: int | None = None
    tokens: int = 0


class Logits(NamedTuple):
    """Which positions of a forward become logits, where not all of them do.

    Attributes:
        places: where there are only these positions then.
        positions: those of each row, counted from the first that is computed.
    """

    places: frozenset[Place]
    positions: Sequence[Sequence[int]]

    @property
    def most(self) -> int:
        """How many positions of each row of the batch become logits."""
        return max(map(len, self.positions))


class PassPlan(NamedTuple):
    """One pass.

    Attributes:
        rows: its rows, those first that leave out least.
        positions: how many positions of each row it computes.
        first_position: how many positions all of its rows leave out.
        terms: what it is like, if several invocations could share it.
        apart: why it is of one invocation, if several could share it otherwise.
        differentiates: whether autograd records it.
        logits: which positions become logits; None for all.
        leaves: the blocks at which rows of other passes begin, with what it has computed.
        caches: whether those rows need its keys and values too.
        through: where it may not have ended before, though nothing is read there.
        why: why its invocations share it, in the words of `explain()`.
        notes: what else is said there: why it is run again.
    """

    rows: Sequence[Row]
    positions: int
    first_position: int = 0
    terms: Terms | None = None
    apart: Fallback | None = None
    differentiates: bool = False
    logits: Logits | None = None
    leaves: frozenset[int] = frozenset()
    caches: bool = False
    through: Place | None = None
    why: str = ""
    notes: Sequence[str] = ()

    @property
    def first_block(self) -> int:
        """How many blocks all of its rows leave out."""
        return self.rows[0].first_block

    @property
    def reads(self) -> list[Address]:
        """The sites whose values it gives."""
        return [address for row in self.rows for address in row.reads]

    @property
    def invocations(self) -> list[int]:
        """The invocations for which it computes something."""
        own = {row.invocation for row in self.rows}
        return sorted(own.union(address[0] for address in self.reads))


def alone(number: int, demand: Demand, reads: Sequence[Address]) -> PassPlan:
    """Returns the pass of an invocation that shares none.

    Args:
        number: the number of the invocation.
        demand: what it demands.
        reads: the sites whose values it needs.
    """
    row = Row(number, demand.rows, demand.length, reads, tokens=demand.tokens)
    rest = (0, None, demand.apart, demand.differentiates)
    return PassPlan((row,), demand.length, *rest)


def renumbered(single: PassPlan, numbers: Sequence[int]) -> PassPlan:
    """Returns a pass of a part of a block with the numbers that invocations have in the block.

    Args:
        single: the pass.
        numbers: the number in the block of each invocation of the part.
    """
    rows = tuple(
        row._replace(
            invocation=numbers[row.invocation],
            reads=[(numbers[number], *place) for number, *place in row.reads],
            origin=None if row.origin is None else numbers[row.origin],
        )
        for row in single.rows
    )
    return single._replace(rows=rows)


def rows_by_level(rows: Sequence[Row], blocks: int) -> list[int]:
    """Returns how many rows each block that runs has, in a pass that rows enter at their blocks.

    Args:
        rows: the rows.
        blocks: how many blocks there are.
    """
    entering = [0] * (blocks + 1)
    for row in rows:
        entering[row.first_block] += row.rows
    counts: list[int] = []
    count = 0
    for block in range(blocks):
        count += entering[block]
        # Blocks before the first entry do not run at all.
        if count:
            counts.append(count)
    return counts
