"""Numbers on a terminal: as coloured tables that fit its width, and as one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from insitu.display.axis import Axis
from insitu.display.colours import Scale, css, on, scale_of
from insitu.display.labels import (
    POSITIONS,
    alike,
    labels_of,
    number,
    numbered,
    shortened,
    visible,
    width,
)
from insitu.display.numbers import Numbers, arrange, of_prompt, told

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_ROWS = 40
_RANKED = 20
_TOP = 15
_LABEL = 24


def summary(numbers: Numbers) -> str:
    """Returns in a line what there is, such as "Logit lens: probability, layer 6 x position 8"."""
    sizes = " x ".join(f"{axis.name} {len(axis)}" for axis in numbers.axes)
    values = numbers.values.float()
    found = values[values.isfinite()]
    span = ""
    if found.numel() == 1 and not numbers.axes:
        span = f" {number(found.item())}"
    elif found.numel():
        span = f", from {number(found.min().item())} to {number(found.max().item())}"
    return f"<{numbers.title}: {numbers.quantity}{', ' if sizes else ''}{sizes}{span}>"


def table(numbers: Numbers, room: int = 80) -> RenderableType:
    """Returns numbers as a table for a terminal.

    One axis gives a list with bars, the largest first; two a heat map; more the largest numbers.
    What does not fit is left out, and how much that is stands below.

    Args:
        numbers: what to show.
        room: how wide it may be, in characters.
    """
    from rich.console import Group
    from rich.text import Text

    if not numbers.values.numel():
        return Text(f"{numbers.title}: no numbers")
    title = numbers.title
    if len(numbers.axes) > 2:  # those of one entry need no room
        single = [axis for axis in numbers.axes if len(axis) == 1]
        title = ", ".join([title, *(f"{axis.name} {axis.labels[0]}" for axis in single)])
        numbers = numbers.at(**{axis.name: 0 for axis in single})
    scale = scale_of(numbers.values.float().flatten().tolist(), numbers.centre)
    if not numbers.axes:
        shown, note = Text(number(numbers.values.item())), ""
    elif len(numbers.axes) == 1:
        shown, note = _ranked(numbers, scale, room)
    elif len(numbers.axes) == 2:
        shown, note = _heat_map(numbers, scale, room)
    else:
        shown, note = _top(numbers, scale, room)
    head = Text.assemble((title, "bold"), f"\n{numbers.quantity}")
    parts: list[RenderableType] = [head, shown]
    if note:
        parts.append(Text(note, style="dim"))
    return Group(*parts)


def kept(count: int, most: int) -> list[int | None]:
    """Returns which of so many entries are shown, with None where some are left out.

    Args:
        count: how many there are.
        most: how many may be shown, with the gap.
    """
    if count <= most:
        return list(range(count))
    most = max(most, 2)
    after = (most - 1) // 2
    before = most - 1 - after
    return [*range(before), None, *range(count - after, count)]


def _grid() -> Table:
    from rich.table import Table

    return Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)


def _coloured(text: str, value: float, scale: Scale) -> Text:
    from rich.text import Text

    if not math.isfinite(value):
        return Text(text, style="dim")
    colour = scale.colour(value)
    return Text(text, style=f"{on(colour)} on {css(colour)}")


def _heat_map(numbers: Numbers, scale: Scale, room: int) -> tuple[RenderableType, str]:
    from rich.text import Text

    places = arrange(numbers.axes)
    values, axes = numbers.values.float(), numbers.axes
    texts = [*map(visible, numbers.texts)]
    rows = [texts[at : at + len(axes[1])] for at in range(0, len(texts), len(axes[1]))]
    if axes[0].name == places.x:
        values, rows, axes = values.T, [*map(list, zip(*rows, strict=True))], axes[::-1]
    y, x = (of_prompt(numbers, axis) for axis in axes)
    y_labels = labels_of(y, min(_LABEL, room // 4))
    label = max(*map(width, y_labels), min(width(y.name), room // 4))
    write = alike(values.flatten().tolist())
    written = [[write(value) for value in row] for row in values.tolist()]
    cells = rows or written
    cell = min(max(width(text) for row in cells for text in row), 9)
    if texts:  # shortened, if that makes room for all
        cell = min(cell, max((room - label - 1) // len(x) - 1, 5))
    cell = max(cell, min(max(map(width, labels_of(x, 6))), 6))
    shown_x = kept(len(x), max((room - label - 1) // (cell + 1), 2))
    shown_y = kept(len(y), _ROWS)
    if y.name == "layer":
        shown_y = shown_y[::-1]
    grid = _grid()
    x_labels = labels_of(x, cell)
    head = [Text("…" if at is None else _padded(x_labels[at], cell)) for at in shown_x]
    grid.add_row(Text(shortened(y.name, label)), *head)
    for row in shown_y:
        if row is None:
            grid.add_row(Text("…", style="dim"))
            continue
        line = [
            Text("…", style="dim")
            if at is None
            else _coloured(
                _padded(shortened(cells[row][at], cell), cell), float(values[row, at]), scale
            )
            for at in shown_x
        ]
        grid.add_row(Text(y_labels[row]), *line)
    return grid, _left_out([(x.name, shown_x, len(x)), (y.name, shown_y, len(y))])


def _padded(text: str, cell: int) -> str:
    left = (cell - width(text)) // 2
    return " " * left + text + " " * (cell - width(text) - left)


def _left_out(axes: Sequence[tuple[str, Sequence[int | None], int]]) -> str:
    said = [
        f"{sum(at is not None for at in shown)} of {count} {name}s"
        for name, shown, count in axes
        if None in shown
    ]
    return f"shown: {' and '.join(said)}" if said else ""


def _ranked(numbers: Numbers, scale: Scale, room: int) -> tuple[RenderableType, str]:
    from rich.text import Text

    axis = of_prompt(numbers, numbers.axes[0])
    values = numbers.values.float().tolist()
    centre = numbers.centre or 0.0
    there = [at for at, value in enumerate(values) if not math.isnan(value)]
    order = sorted(there, key=lambda at: -values[at])
    if numbers.centre is not None:  # what is far below counts as much as what is far above
        order = sorted(there, key=lambda at: -abs(values[at] - centre))
    shown = order[:_RANKED]
    if numbers.centre is not None:
        shown = sorted(shown, key=lambda at: -values[at])
    names = [shortened(told(axis, at), min(32, room // 2)) for at in shown]
    texts = [shortened(visible(numbers.texts[at]), 16) if numbers.texts else "" for at in shown]
    label = max(map(width, names), default=0) + max(map(width, texts), default=0) + 12
    finite = [abs(v - centre) for v in values if math.isfinite(v)]
    long, reach = max(min(room - label, 40), 0), max(finite, default=0.0) or 1.0
    grid = _grid()
    for at, name, text in zip(shown, names, texts, strict=True):
        value = values[at]
        share = abs(value - centre) / reach if math.isfinite(value) else 0.0
        bar = Text(_bar(share * long), style=_style(value, centre))
        cells = [Text(name), Text(number(value), justify="right"), bar]
        grid.add_row(*cells, *([Text(text)] if numbers.texts else []))
    left = len(there) - len(shown)
    return grid, f"and {left} more" if left else ""


def _style(value: float, centre: float) -> str:
    return "#d55e00" if value < centre else "#0072b2"


def _bar(long: float) -> str:
    """A bar so many characters long, to an eighth."""
    whole, eighths = divmod(round(long * 8), 8)
    return "█" * whole + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")


def _placed(axis: Axis, longest: int) -> list[str]:
    """The labels of an axis; of tokens, which may be there twice, with their positions."""
    labels = labels_of(axis, longest)
    if axis.name not in POSITIONS or numbered(axis.labels):
        return labels
    return [shortened(f"{at} {label}", longest) for at, label in enumerate(labels)]


def _top(numbers: Numbers, scale: Scale, room: int) -> tuple[RenderableType, str]:
    from rich.text import Text

    flat = numbers.values.float().flatten()
    centre = numbers.centre
    sizes = (flat if centre is None else (flat - centre).abs()).nan_to_num(nan=-math.inf)
    found = sizes.topk(min(_TOP, len(flat))).indices.tolist()
    grid = _grid()
    longest = max(room // (len(numbers.axes) + 2), 6)
    grid.add_row(*(Text(shortened(axis.name, longest), style="bold") for axis in numbers.axes))
    labels = [_placed(of_prompt(numbers, axis), longest) for axis in numbers.axes]
    for at in found:
        if math.isnan(flat[at]):
            continue
        place, rest = [], at
        for axis, some in zip(reversed(numbers.axes), reversed(labels), strict=True):
            rest, index = divmod(rest, len(axis))
            place.append(Text(some[index]))
        value = float(flat[at])
        text = [Text(shortened(visible(numbers.texts[at]), longest))] if numbers.texts else []
        grid.add_row(*reversed(place), _coloured(f" {number(value)} ", value, scale), *text)
    there = int((~flat.isnan()).sum())
    largest = "largest" if centre is None else f"farthest from {number(centre)}"
    return grid, f"the {largest} of {there:,} numbers" if there > len(found) else ""
