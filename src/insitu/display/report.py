"""What was found in a model and whether it holds, as plain data and as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Outcome = Literal["ok", "differs", "refused", "not checked"]


@dataclass(frozen=True, slots=True)
class Found:
    """What a standard name stands for in a model.

    Attributes:
        name: the name, as it is written on the model or on a block: "attention.q".
        stands_for: the site, the module or the weights; "" if there is nothing.
        shape: of the value in the run that was made, or of the weights.
        missing: why there is nothing; "" if there is something.
    """

    name: str
    stands_for: str = ""
    shape: tuple[int, ...] | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """The model as a whole, or all of its blocks that are alike.

    Attributes:
        title: which part, as one would write it: "transformer.h[0-5]".
        path: the module that is shown, such as the first of these blocks; "" for the model.
        names: its standard names.
    """

    title: str
    path: str
    names: Sequence[Found]


@dataclass(frozen=True, slots=True)
class Check:
    """Whether something holds in a run of the model that has to, if its parts are what they seem.

    Attributes:
        name: what has to hold.
        where: the module in which.
        outcome: whether it does; "refused" where names are not given because it does not.
        difference: the largest difference between both sides, relative to what they are summed up
            of; None if none was found, or if it is no number.
        allowed: up to which difference both sides are the same but for rounding.
        note: what differs, why it was not checked, or what else was seen.
    """

    name: str
    where: str
    outcome: Outcome
    difference: float | None = None
    allowed: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a model, and what of it was verified.

    Attributes:
        name: what the model was loaded as, or its class.
        architecture: its class.
        sizes: its numbers by their standard names.
        parts: its parts.
        checks: what was verified.
    """

    name: str
    architecture: str
    sizes: Mapping[str, int]
    parts: Sequence[Part]
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return all(check.outcome != "differs" for check in self.checks)


def render(report: Report) -> RenderableType:
    """Returns a report as tables."""
    sizes = ", ".join(f"{name} {size}" for name, size in report.sizes.items())
    head = Text.assemble((report.name, "bold"), f": {report.architecture}\n", sizes)
    shown: list[RenderableType] = [head]
    for part in report.parts:
        shown += [Text(), Text(part.title, style="bold"), _names(part)]
    shown += [Text(), Text("In a run of the model", style="bold"), _checks(report.checks)]
    return Group(*shown)


def _table(*styles: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 2), pad_edge=False)
    for style in styles:
        table.add_column(style=style, overflow="fold")
    return table


def _names(part: Part) -> Table:
    table = _table("cyan", "", "")
    for found in part.names:
        name = Text("  " + found.name)
        if found.missing:
            table.add_row(name, Text("—", style="dim"), Text(found.missing, style="dim"))
        else:
            shape = "" if found.shape is None else str(found.shape)
            inside = f"{part.path}." if part.path else ""
            table.add_row(name, Text(shape), Text(found.stands_for.replace(inside, "", 1)))
    return table


_STYLES = {
    "ok": ("OK", "green"),
    "differs": ("DIFFERS", "bold red"),
    "refused": ("REFUSED", "yellow"),
    "not checked": ("—", "dim"),
}


def _checks(checks: Sequence[Check]) -> Table:
    table = _table("cyan", "", "")
    for name, outcome, alike in _alike(checks):
        word, style = _STYLES[outcome]
        table.add_row(Text("  " + name), Text(word, style=style), Text(_said(alike)))
    return table


def _alike(checks: Sequence[Check]) -> Iterator[tuple[str, Outcome, list[Check]]]:
    """Checks of one name that went alike; each that differs by itself."""
    names = list(dict.fromkeys(check.name for check in checks))
    order = ("differs", "refused", "ok", "not checked")

    def place(check: Check) -> tuple[int, int, str]:
        return names.index(check.name), order.index(check.outcome), check.note

    for _, group in groupby(sorted(checks, key=place), key=place):
        alike = list(group)
        each = [[check] for check in alike] if alike[0].outcome == "differs" else [alike]
        for some in each:
            yield some[0].name, some[0].outcome, some


def _said(alike: Sequence[Check]) -> str:
    """The notes of the checks of one name and outcome."""
    first = alike[0]
    where = first.where if len(alike) == 1 else f"{len(alike)} times"
    worst = max((c for c in alike if c.difference is not None), key=_difference, default=None)
    said = [f"{where}:" if worst or first.note else where]
    if worst is not None:
        said.append(f"largest difference {worst.difference:.1e}")
        if len(alike) > 1:
            said.append(f"in {worst.where}")
        if worst.allowed is not None and first.outcome == "differs":
            said.append(f"(rounding makes {worst.allowed:.1e})")
    note = first.note
    if worst is not None and note:
        said[-1] += ","
    return " ".join([*said, note] if note else said)


def _difference(check: Check) -> float:
    return check.difference or 0.0
