"""What benchmarks print and keep: tables, and figures that the project holds itself to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Figure:
    """A number with its limit.

    Attributes:
        what: what it says.
        value: the number.
        limit: what it may be at most, or has to be at least.
        least: whether it has to be at least that.
    """

    what: str
    value: float
    limit: float
    least: bool = False

    @property
    def missed(self) -> bool:
        return self.value < self.limit if self.least else self.value > self.limit

    def cells(self) -> list[str]:
        bound = "at least" if self.least else "at most"
        verdict = "MISSED" if self.missed else ""
        return [self.what, f"{self.value:.2f}", f"{bound} {self.limit:g}", verdict]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells with a title. The first column is text, the others are numbers.

    Attributes:
        title: what stands over it.
        columns: the heads of its columns.
        rows: a cell for each of them.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            [self.title, *("  ".join(_aligned(line, widths)).rstrip() for line in lines)]
        )

    def markdown(self) -> str:
        rule = ["---", *("---:" for _ in self.columns[1:])]
        lines = [self.columns, rule, *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"## {self.title}\n\n{table}\n"


def figures(found: Sequence[Figure]) -> Table:
    """Returns a table of figures and of what they miss."""
    columns = ("figure", "value", "limit", "verdict")
    return Table("What the project holds itself to", columns, [each.cells() for each in found])


def write_part(path: Path, parts: Sequence[str]) -> None:
    """Writes a part of a file of results, in the place of the one with the same title.

    Args:
        path: the file, in which each part begins with a title of the first rank.
        parts: the text: its title and what it says, and then tables.
    """
    text = "\n".join(parts)
    title = text.partition("\n")[0]
    before = f"\n{path.read_text()}" if path.exists() else ""
    kept = [f"# {one}" for one in before.split("\n# ")[1:]]
    at = next((n for n, one in enumerate(kept) if one.startswith(f"{title}\n")), len(kept))
    kept[at : at + 1] = [text]
    path.write_text("\n".join(one.rstrip("\n") + "\n" for one in kept))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    sides: list[Callable[[str, int], str]] = [str.ljust] + [str.rjust] * (len(cells) - 1)
    return [side(*cell) for side, *cell in zip(sides, cells, widths, strict=True)]
