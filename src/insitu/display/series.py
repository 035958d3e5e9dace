"""Bars and lines: numbers along one axis, of one thing or of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from insitu.display.axis import Axis
from insitu.display.canvas import INK, Canvas, plotly
from insitu.display.colours import LINES, SEQUENTIAL, Scale, css
from insitu.display.labels import html, labels_of, number, visible, width, wrapped
from insitu.display.numbers import POSITIONS, Numbers, of_prompt, told
from insitu.display.ticks import CHARACTER, along_x, along_y

_NEGATIVE = LINES[1]
_MOST_LYING = 80
_MARGIN = 64  # of the numbers at an axis, with its name


def series(
    numbers: Numbers,
    along: str | None,
    lines: bool,
    title: str,
    wanted: tuple[float | None, float | None],
) -> Any:
    """Returns a picture of bars or lines.

    Args:
        numbers: with at most two axes.
        along: the axis along which they are drawn, if there are two.
        lines: whether points are joined, and not drawn as bars.
        title: what stands over it.
        wanted: the width and height of the whole, in pixels; None for what suits it.

    Raises:
        MissingPackageError: if plotly is not installed.
    """
    go = plotly()
    axes = [of_prompt(numbers, axis) for axis in numbers.axes] or [Axis(numbers.quantity, ("",))]
    values = numbers.values.detach().float().cpu().reshape([len(axis) for axis in axes])
    axis, groups = axes[-1], axes[0] if len(axes) == 2 else None
    if groups is not None and groups.name == along:
        axis, groups, values = groups, axis, values.T
    rows = [_finite(row) for row in (values if groups is not None else values[None]).tolist()]
    longest = max((width(label) for label in labels_of(axis, 24)), default=0)
    lying = not lines and longest > 6 and axis.name not in POSITIONS and len(axis) <= _MOST_LYING
    places = _places(axis) if lines else list(range(len(axis)))
    thick = max(min(720 / len(axis), 40), 14 if lying else 1200 / max(len(axis), 80))
    long = max(thick * (1 if len(rows) == 1 else 1.5) * len(axis), 440 if lines else 220)
    canvas = Canvas(title, 420 if lying else max(long, 300), long if lying else 260)
    canvas.right = 24 if groups is None else 64 + 20 * CHARACTER * 12
    measured = lines and _measured(axis)
    # Plotly chooses the ticks of a measured axis: a few round numbers, which need not turn.
    labelled_by = Axis(axis.name, ("",)) if measured else axis
    for _ in range(2):
        step = (canvas.height if lying else canvas.width) / len(labelled_by)
        ticks = along_y(labelled_by, step) if lying else along_x(labelled_by, step)
        canvas.left = ticks.room + 33 if lying else max(_MARGIN + 16, ticks.before - step / 2)
        canvas.below = 48 if lying else ticks.room + 37
        layout = canvas.layout()
        canvas.width += wanted[0] - layout["width"] if wanted[0] else 0
        canvas.height += wanted[1] - layout["height"] if wanted[1] else 0
    names = labels_of(groups, 20) if groups is not None else [numbers.quantity]
    texts = [numbers.texts] if len(axes) == 1 and numbers.texts else []
    hovers = _hovers(axis, groups, rows, numbers.quantity, texts)
    traces = []
    for at, row in enumerate(rows):
        options = {"name": html(names[at]), "hovertext": hovers[at], "hoverinfo": "text"}
        colour = _colour(at, len(rows))
        if lines:
            line = {"color": colour, "width": 2}
            traces.append(go.Scatter(x=places, y=row, mode="lines+markers", line=line, **options))
            continue
        base = numbers.centre or 0.0
        signed = groups is None and numbers.centre is not None
        marker: Any = {"color": colour}
        if signed:
            marker = {"color": [_NEGATIVE if v is not None and v < base else colour for v in row]}
        size = [None if v is None else v - base for v in row]
        way = {"x": size, "y": places, "orientation": "h"} if lying else {"x": places, "y": size}
        traces.append(go.Bar(base=base, marker=marker, **way, **options))
    plain = {"zeroline": False, "showgrid": False, "ticks": "", "showline": False}
    span = [-0.5, len(axis) - 0.5]
    labelled: dict[str, Any] = {**plain, **ticks.of(), "tickangle": ticks.angle}
    labelled |= {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
    if measured:
        labelled = {
            **labelled,
            "tickvals": None,
            "ticktext": None,
            "nticks": max(int(canvas.width / 70), 2),
            "exponentformat": "e",
        }
    else:
        labelled["range"] = span[::-1] if lying else span
    counted: dict[str, Any] = {
        **plain,
        "showgrid": True,
        "gridcolor": "#e6e6e6",
        "nticks": max(int((canvas.width if lying else canvas.height) / (80 if lying else 45)), 2),
        "exponentformat": "e",
    }
    if numbers.centre is not None or not lines:
        counted |= {"zeroline": not numbers.centre, "zerolinecolor": INK, "zerolinewidth": 1}
    quantity = "<br>".join(map(html, wrapped(numbers.quantity, int(canvas.height / 8))))
    if lying:
        canvas.label_axes(numbers.quantity, axis.name)
    else:
        low = canvas.height + canvas.below - 4
        canvas.text(axis.name if numbers.axes else "", canvas.width / 2, low, yanchor="bottom")
        counted["title"] = {"text": quantity, "standoff": 8}
    figure = go.Figure(traces)
    figure.update_layout(
        canvas.layout(
            xaxis=counted if lying else labelled,
            yaxis=labelled if lying else counted,
            barmode="group",
            bargap=0.2,
            showlegend=groups is not None,
            legend={
                "title": {"text": html(groups.name) if groups is not None else ""},
                "x": canvas.x(canvas.width + 12),
                "xanchor": "left",
                "y": 1,
                "yanchor": "top",
            },
        )
    )
    return figure


def is_curve(axis: Axis) -> bool:
    """Returns whether numbers along an axis are a curve: it is measured, and not counted."""
    return _measured(axis) and len(axis) > 1


def _measured(axis: Axis) -> bool:
    if axis.name in ("layer", "head", "neuron", "expert", "prompt", "token", "site", *POSITIONS):
        return False
    try:
        return all(math.isfinite(float(label)) for label in axis.labels)
    except ValueError:
        return False


def _places(axis: Axis) -> list[float]:
    if _measured(axis):
        return [float(label) for label in axis.labels]
    return [float(index) for index in range(len(axis))]


def _finite(row: Sequence[float]) -> list[float | None]:
    """Numbers of a row, None where one is none that can be drawn."""
    return [value if math.isfinite(value) else None for value in row]


def _colour(at: int, count: int) -> str:
    """A colour of its own for each of a few, and from dark to light for each of many."""
    if count <= len(LINES):
        return LINES[at]
    return css(Scale(SEQUENTIAL, 0.0, count * 1.15).colour(at))


def _hovers(
    axis: Axis,
    groups: Axis | None,
    rows: Sequence[Sequence[float | None]],
    quantity: str,
    texts: Sequence[Sequence[str]],
) -> list[list[str]]:
    """The text of a number that is pointed at."""
    said = []
    for at, row in enumerate(rows):
        head = [told(groups, at)] if groups is not None else []
        said.append(
            [
                "<br>".join(
                    html(line)
                    for line in (
                        *head,
                        told(axis, index),
                        f"{quantity} {number(float('nan') if value is None else value)}",
                        *(visible(some[index]) for some in texts),
                    )
                )
                for index, value in enumerate(row)
            ]
        )
    return said
