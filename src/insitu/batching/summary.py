"""What a run does, told to the user: its passes, the blocks that each leaves out, and why.

It is derived from the plans of its passes, when somebody asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from insitu.batching.cost_model import Costs
from insitu.batching.crossings import Moments, bounding
from insitu.batching.pass_plan import PassPlan, rows_by_level


@dataclass(frozen=True, slots=True)
class Summary:
    """What one pass does.

    Attributes:
        invocations: the numbers of the invocations for which it computes something.
        rows: how many rows its batch has in the end; 0 where that is not known.
        positions: how many positions of each row it computes.
        run: how many blocks of the model it runs.
        skipped: how many it leaves out, because another pass has done them.
        flops: floating-point operations, counted where the model's blocks are known, else 0.
        reason: why it is a pass of its own.
        alone: the floating-point operations of each of its invocations, if it were run alone and
            to the model's end.
    """

    invocations: Sequence[int]
    rows: int
    positions: int
    run: int
    skipped: int
    flops: float
    reason: str
    alone: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Planned:
    """How a block runs: what `tracer.plan` gives.

    Attributes:
        passes: what each pass does, in their order.
    """

    passes: Sequence[Summary]

    @property
    def flops(self) -> float:
        """Floating-point operations of all passes."""
        return sum(single.flops for single in self.passes)

    @property
    def naive_flops(self) -> float:
        """Floating-point operations of the invocations, if each ran alone to the model's end."""
        alone = {number: cost for single in self.passes for number, cost in single.alone.items()}
        return sum(alone.values())

    @property
    def costs(self) -> list[float]:
        """What each pass costs beside the others: operations, or places if these are not known."""
        if all(single.flops for single in self.passes):
            return [single.flops for single in self.passes]
        places = [single.rows * single.positions * single.run for single in self.passes]
        return [float(place) for place in places] if all(places) else [1.0] * len(places)

    def explain(self) -> str:
        """Returns a table of the passes, with what each leaves out and why."""
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(
                cell.ljust(width) if at in (1, 7) else cell.rjust(width)
                for at, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, *self._total()])

    def _repr_html_(self) -> str:
        from insitu.display.rows import rows_html  # display stands on this, not under it

        head, *lines = self._lines()
        left = {"invocations", "why"}
        return rows_html(head, lines, left, "".join(self._total()))

    def _lines(self) -> list[tuple[str, ...]]:
        """The names of the columns, and the cells of each pass."""
        head = (
            "pass",
            "invocations",
            "rows",
            "positions",
            "blocks",
            "skipped",
            "GFLOP",
            "why",
        )
        lines: list[tuple[str, ...]] = [head]
        for number, single in enumerate(self.passes):
            counts = (single.rows, single.positions, single.run, single.skipped)
            lines.append(
                (
                    str(number),
                    _ranges(single.invocations),
                    *(str(n) if single.rows else "?" for n in counts),
                    f"{single.flops / 1e9:,.3g}" if single.flops else "?",
                    single.reason,
                )
            )
        return lines

    def _total(self) -> list[str]:
        """What all passes cost, in a line; none if that is not known."""
        if not (self.flops and self.naive_flops):
            return []
        return [
            f"{self.flops / 1e9:,.4g} GFLOP; each invocation alone, in full: "
            f"{self.naive_flops / 1e9:,.4g} ({self.naive_flops / self.flops:.1f} times as much)"
        ]


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as one would write them, with runs of them as "3-7"; the first few."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts[:3]]
    return ", ".join(shown) + (f", ... ({len(numbers)})" if len(parts) > 3 else "")


class Facts(NamedTuple):
    """The facts of the model whose passes are told.

    Attributes:
        blocks: the paths of its blocks.
        heads: the modules that make logits.
        costs: what its forwards cost; None for generations.
    """

    blocks: Sequence[str]
    heads: Sequence[str] = ()
    costs: Costs | None = None


def summaries(passes: Sequence[PassPlan], facts: Facts | None, moments: Moments) -> list[Summary]:
    """Returns what some passes do.

    Args:
        passes: the passes.
        facts: the facts of the model; None where a pass is one call of some module.
        moments: when the sites of an invocation come.
    """
    found = [_summary(single, facts, moments) for single in passes]
    return [
        replace(one, reason="; ".join([one.reason, *single.notes])) if single.notes else one
        for one, single in zip(found, passes, strict=True)
    ]


def _summary(single: PassPlan, facts: Facts | None, moments: Moments) -> Summary:
    """What one pass does."""
    apart = "" if single.apart is None else single.apart.why
    rows = sum(row.rows for row in single.rows)
    shape = rows, single.positions
    if facts is None or (facts.costs is None and len(single.rows) == 1):
        return Summary(single.invocations, 0, 0, 0, 0, 0.0, apart or "one call of the model", {})
    if facts.costs is None:
        return Summary(single.invocations, *shape, len(facts.blocks), 0, 0.0, single.why, {})
    costs, skipped = facts.costs, single.first_block
    run, ending = _blocks_run(single, facts.blocks, moments)
    ends = {("", "output", 0), *((path, "output", 0) for path in facts.heads)}
    unembedded = 0
    if any(address[1:4] in ends for address in single.reads):
        logits = single.positions if single.logits is None else single.logits.most
        unembedded = rows * logits
    counts = [rows] * run
    if skipped:
        # Rows enter at blocks, so that each block has as many as have entered by then.
        counts = rows_by_level(single.rows, costs.blocks)[: max(run - skipped, 0)]
    longest = max(row.length for row in single.rows)
    flops = costs.flops(counts, single.positions, longest, unembedded)
    alone: dict[int, float] = {}
    for row in single.rows:
        whole = costs.flops(
            [row.rows] * costs.blocks, row.length, row.length, row.rows * row.length
        )
        # By invocation: one that runs in two passes would be run alone once.
        alone.update(dict.fromkeys([row.invocation, *(at[0] for at in row.reads)], whole))
    why = single.why or apart or "one prompt"
    return Summary(single.invocations, *shape, len(counts), skipped, flops, why + ending, alone)


def _blocks_run(single: PassPlan, blocks: Sequence[str], moments: Moments) -> tuple[int, str]:
    """How many blocks a pass goes through before it ends, and why it ends if not at the end."""
    reads = single.reads
    order = moments(reads[0][0] if reads else 0)
    # A function in a forward needs no more than that the module around it runs.
    places = [bounding(address, "output")[1:4] for address in reads]
    if single.through is not None:
        places.append(single.through)
    if not blocks or order is None or any(place not in order for place in places):
        return len(blocks), ""
    last = max((order[place] for place in places), default=-1)
    run = sum(order.get((path, "inputs", 0), -1) < last for path in blocks)
    if run == len(blocks):
        return run, ""
    return run, f"; nothing is read after {f'block {run - 1}' if run else 'the embeddings'}"
