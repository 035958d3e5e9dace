"""The bar of colours beside a picture, and the menu with which one entry is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from insitu.display.axis import Axis
from insitu.display.canvas import INK, Canvas
from insitu.display.colours import Scale
from insitu.display.labels import POSITIONS, html, labels_of, number, shortened, wrapped
from insitu.display.ticks import CHARACTER

_FEW = 12
_LIST = 46
_SLIDER = 76


def make_room(canvas: Canvas, count: int) -> None:
    """Makes room for what the shown entry is chosen with: a list of a few, a slider for many.

    Args:
        canvas: the picture.
        count: how many entries there are.
    """
    canvas.over = _LIST if 1 < count <= _FEW else 0
    canvas.under = _SLIDER if count > _FEW else 0


def choice(
    menu: Sequence[Axis],
    states: Sequence[Sequence[int]],
    changes: Sequence[dict[str, Any]],
    counts: Sequence[int],
    canvas: Canvas,
    at: int = 0,
) -> dict[str, Any]:
    """Returns what the shown entry is chosen with, for plotly's layout.

    Args:
        menu: the axes that are chosen from.
        states: the choices, as an index on each of the axes.
        changes: what each changes in the layout.
        counts: how many traces each has.
        canvas: the picture, which has room for it.
        at: which is shown first.
    """
    if len(states) < 2:
        return {}
    axes = [
        axis if axis.name == "prompt" else Axis(axis.name, tuple(labels_of(axis))) for axis in menu
    ]
    longest = int((canvas.width + canvas.right - 60) / (CHARACTER * 12))
    steps = []
    for here, state in enumerate(states):
        pairs = zip(axes, state, strict=True)
        label = ", ".join(_named(axis, index) for axis, index in pairs)
        shown = [here == there for there, count in enumerate(counts) for _ in range(count)]
        steps.append(
            {
                "label": html(shortened(label, longest)),
                "method": "update",
                "args": [{"visible": shown}, changes[here]],
            }
        )
    if len(states) <= _FEW:
        place = {"x": 0, "xanchor": "left", "y": canvas.y(-canvas.above), "yanchor": "bottom"}
        none = {"t": 0, "b": 0, "l": 0, "r": 0}
        look = {"bgcolor": "#ffffff", "pad": none, "active": at}
        return {"updatemenus": [{**place, **look, "buttons": steps}]}
    slider = {
        "steps": steps,
        "active": at,
        "x": 0,
        "len": 1,
        "y": canvas.y(canvas.height + canvas.below),
        "yanchor": "top",
        "pad": {"t": 24, "b": 0, "l": 0, "r": 0},
        "currentvalue": {"xanchor": "left", "offset": 8, "font": {"size": 12, "color": INK}},
        "font": {"size": 1, "color": "rgba(0,0,0,0)"},  # of labels below, of which there are many
        "ticklen": 0,
        "minorticklen": 4,
    }
    return {"sliders": [slider]}


def bar_length(canvas: Canvas) -> int:
    """Returns how long the bar of colours is, in pixels."""
    return round(min(canvas.height, 320))


def _named(axis: Axis, index: int) -> str:
    label = axis.labels[index]
    if axis.name in POSITIONS and not label.isdecimal():
        return f"{axis.name} {index}: {label}"
    return f"{axis.name} {label}"


def colour_axis(scale: Scale, quantity: str, canvas: Canvas) -> dict[str, Any]:
    """Returns a scale with the bar that explains it, as plotly takes it.

    Args:
        scale: the scale.
        quantity: what a number is.
        canvas: beside which it stands.
    """
    length = bar_length(canvas)
    ticks = scale.ticks(max(length // 20, 3))
    return {
        "colorscale": scale.steps(),
        "cmin": scale.low,
        "cmax": scale.high,
        "colorbar": {
            "title": {
                "text": "<br>".join(map(html, wrapped(quantity, length // 8))),
                "side": "right",
            },
            "thickness": 14,
            "lenmode": "pixels",
            "len": length,
            "x": canvas.x(canvas.width + 12),
            "xanchor": "left",
            "xpad": 0,
            "y": 1,
            "yanchor": "top",
            "ypad": 0,
            "tickvals": ticks,
            "ticktext": [number(tick) for tick in ticks],
            "outlinewidth": 0,
        },
    }
