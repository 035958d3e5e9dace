"""Panels of a heat map: the content, the size and the place of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import Any

from insitu.display.axis import Axis
from insitu.display.canvas import Canvas
from insitu.display.labels import alike, shortened, visible, width, wrapped
from insitu.display.menu import bar_length, make_room
from insitu.display.numbers import Arrangement, Numbers, of_prompt, told
from insitu.display.ticks import CHARACTER, Ticks, along_x, along_y

_MOST_WRITTEN = 1_500
GAP = 16
HEADING = 20


@dataclass(frozen=True, slots=True)
class Panel:
    """One field of cells.

    Attributes:
        y: the axis at its side.
        x: the axis from left to right.
        values: the numbers that have a colour, row by row; NaN where there is none.
        numbers: all of them, infinite ones too.
        texts: what else there is to say of each, row by row; empty if there is nothing.
        heading: what it is of; "" if there is but one.
        written: what stands in the cells, row by row; empty if nothing does.
    """

    y: Axis
    x: Axis
    values: Any
    numbers: Any
    texts: Sequence[Sequence[str]]
    heading: str = ""
    written: Sequence[Sequence[str]] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of panels and their places, in pixels.

    Attributes:
        columns: how many panels are beside each other.
        rows: how many are above each other.
        width: of a panel.
        height: of a panel.
        last: how much room is added over the last row, for labels of panels that end above it.
    """

    columns: int
    rows: int
    width: float
    height: float
    last: float = 0

    def place(self, number: int) -> tuple[float, float]:
        """Returns how far right and how far down a panel is."""
        row, column = divmod(number, self.columns)
        down = row * (self.height + GAP + HEADING) + (self.last if row == self.rows - 1 else 0)
        return column * (self.width + GAP), down if row else 0.0

    @property
    def size(self) -> tuple[float, float]:
        """The width and height of all."""
        x, y = self.place(self.columns * self.rows - 1)
        return x + self.width, y + self.height


def panels_of(
    numbers: Numbers, arrangement: Arrangement, in_cells: bool | None
) -> tuple[list[Axis], list[tuple[int, ...]], list[list[Panel]]]:
    """Returns what there is to choose from, and the panels of each choice.

    Args:
        numbers: the numbers that are drawn.
        arrangement: which axis goes where.
        in_cells: whether texts, or numbers where there are none, stand in the cells; None for
            where they are few enough.

    Returns:
        The axes of the menu; the choices, as an index on each of these; and their panels.
    """
    menu = [of_prompt(numbers, axis_of(numbers, name)) for name in arrangement.menu]
    states = [*product(*(range(len(axis)) for axis in menu))]
    drawn = [_panels(numbers, arrangement, state) for state in states]
    first = drawn[0][0]
    if in_cells is None:
        few = first.values.size <= (_MOST_WRITTEN if len(first.texts) else 150)
        alone = len(drawn[0]) == 1
        in_cells = alone and few and (bool(len(first.texts)) or len(first.x) <= 16)
    if in_cells:
        write = alike(numbers.values.float().flatten().tolist())
        drawn = [
            [replace(panel, written=_written(panel, write)) for panel in some] for some in drawn
        ]
    return menu, states, drawn


def axis_of(numbers: Numbers, name: str) -> Axis:
    """Returns the axis of a name."""
    return next(axis for axis in numbers.axes if axis.name == name)


def _panels(numbers: Numbers, arrangement: Arrangement, state: Sequence[int]) -> list[Panel]:
    """The panels of one state of the menu."""
    chosen = numbers
    # Prompts first: with one chosen, the positions are its own.
    order = sorted(zip(arrangement.menu, state, strict=True), key=lambda pair: pair[0] != "prompt")
    for name, index in order:
        chosen = chosen.at(**{name: index})
    if arrangement.grid is None:
        return [_panel(chosen, arrangement)]
    axis = of_prompt(chosen, axis_of(chosen, arrangement.grid))
    return [
        replace(_panel(chosen.at(**{axis.name: index}), arrangement), heading=told(axis, index))
        for index in range(len(axis))
    ]


def _panel(numbers: Numbers, arrangement: Arrangement) -> Panel:
    values = numbers.values.detach().float().cpu()
    columns = len(numbers.axes[1])
    texts = [numbers.texts[at : at + columns] for at in range(0, len(numbers.texts), columns)]
    if numbers.axes[0].name == arrangement.x:
        values, texts = values.T, [*zip(*texts, strict=True)]
    finite = values.masked_fill(~values.isfinite(), float("nan"))
    y, x = (of_prompt(numbers, axis_of(numbers, n)) for n in (arrangement.y, arrangement.x))
    if y.name == "prompt" and x.name == "position" and not texts and _ragged(numbers):
        rows = [[visible(token) for token in tokens] for tokens in numbers.tokens]
        texts = [row + [""] * (len(x) - len(row)) for row in rows]
    return Panel(y, x, finite.numpy(), values.numpy(), texts)


def _ragged(numbers: Numbers) -> bool:
    return len(numbers.tokens) == len(axis_of(numbers, "prompt")) and len(set(numbers.tokens)) > 1


def _written(panel: Panel, written: Callable[[float], str]) -> list[list[str]]:
    """What stands in the cells of a panel."""
    if len(panel.texts):
        return [[shortened(visible_text(text), 10) for text in row] for row in panel.texts]
    return [[written(value) for value in row] for row in panel.numbers.tolist()]


def visible_text(text: str) -> str:
    """Returns a text of a cell, which is mostly a token, so that all of it can be seen."""
    return visible(text) if text else ""


def sized(
    drawn: Sequence[Sequence[Panel]],
    quantity: str,
    title: str,
    wanted: tuple[float | None, float | None],
) -> tuple[Grid, Canvas]:
    """Returns how large everything is, with room for all labels.

    Args:
        drawn: the panels of each choice.
        quantity: what a number is.
        title: what stands over it.
        wanted: the width and height of the whole, in pixels; None for what suits it.
    """
    panels, count = [panel for some in drawn for panel in some], len(drawn[0])
    x = max((panel.x for panel in panels), key=len)
    y = max((panel.y for panel in panels), key=len)
    wide, high = _cell_size(len(x), len(y), count, panels[0])
    longest = max(
        (width(cell) for panel in panels for row in panel.written for cell in row), default=0
    )
    if longest:
        wide, high = max(wide, longest * CHARACTER * 11 + 6), max(high, 18.0)
    least = (150, 130) if count == 1 else (110, 70)
    panel = max(wide * len(x), least[0]), max(high * len(y), least[1])
    columns = min(count, max(int((1000 + GAP) / (panel[0] + GAP)), 1))
    rows = ceil(count / columns)
    columns = ceil(count / rows)
    # Labels take room, which the panels do not have if the whole is to be of a size.
    for attempt in range(4):
        step_x, step_y = panel[0] / len(x), panel[1] / len(y)
        at_x, at_y = ticks_of(x, y, step_x, step_y, count)
        last = at_x.room if count % columns else 0.0
        grid = Grid(columns, rows, *panel, last)
        all_wide, all_high = grid.size
        canvas = Canvas(title, all_wide, all_high)
        canvas.left = max(at_y.room + 28, at_x.before - step_x / 2 + 24)
        canvas.right = 100 + 17 * (len(wrapped(quantity, bar_length(canvas) // 8)) - 1)
        canvas.above = 12 + (HEADING if count > 1 else 0)
        canvas.below = at_x.room + 28
        make_room(canvas, len(drawn))
        layout = canvas.layout()
        over = [
            (size - layout[name]) if size is not None else 0.0
            for size, name in zip(wanted, ("width", "height"), strict=True)
        ]
        if not any(over):
            break
        if attempt == 3 and min(over) > -60:  # labels turn, and need other room again
            canvas.right, canvas.below = canvas.right + over[0], canvas.below + over[1]
            break
        panel = max(panel[0] + over[0] / columns, 40), max(panel[1] + over[1] / rows, 40)
    return grid, canvas


def _cell_size(columns: int, rows: int, count: int, panel: Panel) -> tuple[float, float]:
    """How large a cell is: as large as is good to see, and as so many of them fit."""

    def fitting(number: int, room: float, least: float, most: float, whole: float) -> float:
        size = min(max(room / number, least), most)
        return size if size * number <= whole else max(whole / number, 1.0)

    square = panel.y.name == "query" and panel.x.name == "key"
    if count == 1:
        wide = fitting(columns, 640, 17, 44, 1300)
        high = fitting(rows, 480, 17, 30, 900)
    else:
        wide = fitting(columns, 220, 4, 22, 420)
        high = fitting(rows, 160, 4, 18, 320)
    side = min(wide, high * 1.2)
    return (side, side) if square else (wide, high)


def ticks_of(x: Axis, y: Axis, step_x: float, step_y: float, count: int) -> tuple[Ticks, Ticks]:
    """Returns the ticks of a panel.

    Args:
        x: its axis from left to right.
        y: that at its side.
        step_x: the width of a cell, in pixels.
        step_y: the height of one.
        count: how many panels there are.
    """
    font = 12 if count == 1 else 10
    return along_x(x, step_x, font, 14 if count == 1 else 10), along_y(y, step_y, font)
