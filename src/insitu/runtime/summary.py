"""What a run does, told to the user: its passes, what is left out of each, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from insitu.runtime.fallback import Fallback


@dataclass(frozen=True, slots=True)
class Summary:
    """What one pass does.

    Attributes:
        invocations: the numbers of the invocations of which it computes something.
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


def unknown(invocations: Sequence[int], apart: Fallback | None) -> Summary:
    """Returns the summary of a pass of which only its invocations are known.

    Args:
        invocations: their numbers.
        apart: why it is a pass of its own, if several invocations could share it.
    """
    why = "one call of the model" if apart is None else apart.why
    return Summary(invocations, 0, 0, 0, 0, 0.0, why, {})


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
