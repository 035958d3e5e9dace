"""A prompt as text whose tokens have the colours of numbers, such as of attention to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from insitu.display.axis import Axis
from insitu.display.canvas import MONOSPACE, Canvas, plotly
from insitu.display.colours import scale_of
from insitu.display.labels import html, labels_of, number, shortened, visible, width
from insitu.display.menu import choice, colour_axis, make_room
from insitu.display.numbers import MOST_STATES, Numbers, of_prompt, told
from insitu.graph.errors import OptionError
from insitu.graph.location import here

_FONT = 14
_CHARACTER = 0.61 * _FONT
_LINE = 30


@dataclass(frozen=True, slots=True)
class Line:
    """A line of tokens.

    Attributes:
        first: the position of the first of them.
        edges: where each begins, in pixels, and where the last one ends.
        tokens: as they are shown.
    """

    first: int
    edges: tuple[float, ...]
    tokens: tuple[str, ...]


def token_text(numbers: Numbers, title: str, wanted: tuple[float | None, float | None]) -> Any:
    """Returns a picture of a prompt's tokens, each on the colour of its number.

    What other axes there are is chosen from: of attention from which query, in which head.

    Args:
        numbers: with an axis "key" or "position".
        title: what stands over it.
        wanted: the width and height of the whole, in pixels; None for what suits it.

    Raises:
        OptionError: if there is no axis of tokens, or there is too much to choose from.
        MissingPackageError: if plotly is not installed.
    """
    go = plotly()
    names = [axis.name for axis in numbers.axes]
    along = next((name for name in ("key", "position", "query") if name in names), None)
    if along is None:
        raise OptionError(
            f"Text has tokens along it: there is no axis 'key' or 'position' among {names}.", here()
        )
    menu = [of_prompt(numbers, axis) for axis in numbers.axes if axis.name != along]
    states = [*product(*(range(len(axis)) for axis in menu))]
    if len(states) > MOST_STATES:
        raise OptionError(
            f"These are {len(states)} texts, too many to choose from: choose some with `select`.",
            here(),
        )
    chosen = [_chosen(numbers, menu, state) for state in states]
    at = len(states) - 1 if "query" in [axis.name for axis in menu] else 0
    whole = numbers.values.float().flatten().tolist()
    scale = scale_of(whole, numbers.centre, along == "key")
    wide = (wanted[0] or 780.0) - 112
    texts = [_lines(one.axes[0], wide) for one in chosen]
    most = max(map(len, texts))
    if wanted[0] is None:
        wide = max(300.0, *(line.edges[-1] for text in texts for line in text))
    canvas = Canvas(title, wide, max(most * _LINE, 100.0), right=100)
    make_room(canvas, len(states))
    if wanted[1]:
        canvas.height += wanted[1] - canvas.layout()["height"]
    controls = choice(menu, states, [{}] * len(states), [len(text) for text in texts], canvas, at)
    traces = [
        _trace(one, line, row, numbers.quantity, state == at)
        for state, (one, text) in enumerate(zip(chosen, texts, strict=True))
        for row, line in enumerate(text)
    ]
    figure = go.Figure(traces)
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    figure.update_layout(
        canvas.layout(
            xaxis={**bare, "range": [0, wide]},
            yaxis={**bare, "range": [canvas.height / _LINE, 0]},
            coloraxis=colour_axis(scale, numbers.quantity, canvas),
            showlegend=False,
            **controls,
        )
    )
    return figure


def _chosen(numbers: Numbers, menu: Sequence[Axis], state: Sequence[int]) -> Numbers:
    """The numbers of one text."""
    order = sorted(zip(menu, state, strict=True), key=lambda pair: pair[0].name != "prompt")
    for axis, index in order:
        size = next(len(other) for other in numbers.axes if other.name == axis.name)
        numbers = numbers.at(**{axis.name: min(index, size - 1)})
    return numbers


def _lines(axis: Axis, wide: float) -> list[Line]:
    """Tokens as lines, broken where they are full, and where the text is."""
    lines, edges, tokens, first = [], [0.0], [], 0
    for index, (label, raw) in enumerate(zip(labels_of(axis, 40), axis.labels, strict=True)):
        token = shortened(label, 40)
        size = width(token) * _CHARACTER + 6
        if tokens and edges[-1] + size > wide:
            lines.append(Line(first, tuple(edges), tuple(tokens)))
            edges, tokens, first = [0.0], [], index
        edges.append(edges[-1] + size)
        tokens.append(token)
        if raw.endswith("\n"):
            lines.append(Line(first, tuple(edges), tuple(tokens)))
            edges, tokens, first = [0.0], [], index + 1
    return [*lines, Line(first, tuple(edges), tuple(tokens))] if tokens else lines


def token_row(
    row: int,
    edges: Sequence[float],
    tokens: Sequence[str],
    values: Sequence[float],
    said: Sequence[str],
    size: int = _FONT,
    shown: bool = True,
) -> Any:
    """Returns a row of tokens coloured by a number each, as a trace of plotly.

    Args:
        row: which row of the figure, from 0.
        edges: where tokens begin, in pixels, and where the last ends.
        tokens: the tokens, shortened.
        values: the numbers.
        said: the text that the mouse shows over each.
        size: of the letters, in pixels.
        shown: whether it is seen at first.
    """
    return plotly().Heatmap(
        z=[[*values]],
        x=edges,
        y=(row, row + 1),
        text=[[html(token) for token in tokens]],
        texttemplate="%{text}",
        textfont={"family": MONOSPACE, "size": size},
        hovertext=[[*said]],
        hovertemplate="%{hovertext}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=4,
        visible=shown,
    )


def _trace(one: Numbers, line: Line, row: int, quantity: str, shown: bool) -> Any:
    values = one.values.detach().float().cpu()[line.first : line.first + len(line.tokens)]
    said = [
        f"{html(told(one.axes[0], line.first + at))}<br>{html(quantity)} {number(value)}"
        for at, value in enumerate(values.tolist())
    ]
    if one.texts:
        said = [f"{s}<br>{html(visible(one.texts[line.first + n]))}" for n, s in enumerate(said)]
    seen = values.masked_fill(~values.isfinite(), float("nan")).tolist()
    return token_row(row, line.edges, line.tokens, seen, said, shown=shown)
