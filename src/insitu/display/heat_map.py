"""Heat maps: panels of coloured cells, one or a grid of them, and a menu for the other axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from insitu.display.axis import Axis
from insitu.display.canvas import EMPTY, Canvas, plotly
from insitu.display.colours import Scale, on, scale_of
from insitu.display.labels import html, number, shortened, visible
from insitu.display.menu import choice, colour_axis
from insitu.display.numbers import Arrangement, Numbers, told
from insitu.display.panels import (
    Grid,
    Panel,
    panels_of,
    sized,
    ticks_of,
)
from insitu.display.ticks import CHARACTER
from insitu.graph.errors import OptionError
from insitu.graph.location import here

_MOST_CELLS = 4_000_000
_MOST_HOVERED = 40_000  # with a text of its own for each


def heat_map(
    numbers: Numbers,
    arrangement: Arrangement,
    title: str,
    in_cells: bool | None,
    wanted: tuple[float | None, float | None],
) -> Any:
    """Returns a picture of panels.

    Args:
        numbers: with two axes or more.
        arrangement: which axis goes where.
        title: what stands over it.
        in_cells: whether texts, or numbers where there are none, stand in the cells; None for
            where they are few enough.
        wanted: the width and height of the whole, in pixels; None for what suits it.

    Raises:
        OptionError: if there are too many numbers to be drawn.
        MissingPackageError: if plotly is not installed.
    """
    go = plotly()
    if numbers.values.numel() > _MOST_CELLS:
        raise OptionError(
            f"These are {numbers.values.numel():,} numbers, and at most {_MOST_CELLS:,} can be "
            "drawn: choose some with `select`, or take a `mean`.",
            here(),
        )
    menu, states, drawn = panels_of(numbers, arrangement, in_cells)
    count = len(drawn[0])
    shares = (arrangement.y, arrangement.x) == ("query", "key")
    scale = scale_of(numbers.values.float().flatten().tolist(), numbers.centre, shares)
    grid, canvas = sized(drawn, numbers.quantity, title, wanted)
    hovered = numbers.values.numel() <= _MOST_HOVERED
    traces, axes = [], []
    for at, panels in enumerate(drawn):
        options: dict[str, Any] = {}
        for number_, panel in enumerate(panels):
            traces.append(_trace(go, panel, number_, numbers.quantity, scale, hovered, at == 0))
            options |= _axes_of(panel, number_, count, grid, canvas)
        axes.append(options)
    for number_, panel in enumerate(drawn[0]):
        if panel.heading:
            x, y = grid.place(number_)
            longest = int(grid.width / (CHARACTER * 11))
            heading = shortened(panel.heading, max(longest, 4))
            place = {"xanchor": "left", "yanchor": "bottom", "font": {"size": 11}}
            canvas.text(heading, x, y, **place)
    canvas.label_axes(arrangement.x, arrangement.y)
    changes = _changes(axes)
    controls = choice(menu, states, changes, [count] * len(states), canvas)
    figure = go.Figure(traces)
    figure.update_layout(
        canvas.layout(
            coloraxis=colour_axis(scale, numbers.quantity, canvas),
            showlegend=False,
            plot_bgcolor=EMPTY if numbers.values.isnan().any() else "#ffffff",
            **axes[0],
            **controls,
        )
    )
    return figure


def _axis(numbers: Numbers, name: str) -> Axis:
    return next(axis for axis in numbers.axes if axis.name == name)


def _trace(
    go: Any,
    panel: Panel,
    number_: int,
    quantity: str,
    scale: Scale,
    hovered: bool,
    shown: bool,
) -> Any:
    options: dict[str, Any] = {}
    if panel.written:
        options["text"] = _coloured(panel, scale)
        options["texttemplate"] = "%{text}"
        options["textfont"] = {"size": 11}
    template = f"{panel.y.name} %{{y}}<br>{panel.x.name} %{{x}}<br>{html(quantity)} %{{z:.4g}}"
    if hovered:
        options["hovertext"] = _hovers(panel, quantity)
        template = "%{hovertext}"
    if panel.heading and not hovered:
        template = f"{html(panel.heading)}<br>{template}"
    suffix = str(number_ + 1) if number_ else ""
    return go.Heatmap(
        z=panel.values,
        coloraxis="coloraxis",
        xaxis=f"x{suffix}",
        yaxis=f"y{suffix}",
        hovertemplate=template + "<extra></extra>",
        hoverongaps=False,
        visible=shown,
        xgap=1 if panel.values.size <= 2_500 else 0,
        ygap=1 if panel.values.size <= 2_500 else 0,
        **options,
    )


def _coloured(panel: Panel, scale: Scale) -> list[list[str]]:
    """The text of each cell, in black or white.

    Plotly's own choice is between grey and white, and grey is hard to read on colours between.
    """
    return [
        [
            f'<span style="color:{on(scale.colour(value))}">{html(text)}</span>'
            if text and isfinite(value)
            else html(text)
            for text, value in zip(texts, values, strict=True)
        ]
        for texts, values in zip(panel.written, panel.values.tolist(), strict=True)
    ]


def _hovers(panel: Panel, quantity: str) -> list[list[str]]:
    """The text of a cell that is pointed at."""
    at_y = [told(panel.y, index) for index in range(len(panel.y))]
    at_x = [told(panel.x, index) for index in range(len(panel.x))]
    head = [panel.heading] if panel.heading else []
    return [
        [
            "<br>".join(
                html(line)
                for line in (
                    *head,
                    at_y[row],
                    at_x[column],
                    f"{quantity} {number(float(panel.numbers[row][column]))}",
                    *([visible(panel.texts[row][column])] if len(panel.texts) else []),
                )
            )
            for column in range(len(panel.x))
        ]
        for row in range(len(panel.y))
    ]


def _axes_of(panel: Panel, number_: int, count: int, grid: Grid, canvas: Canvas) -> dict[str, Any]:
    """The axes of a panel, as plotly takes them."""
    x, y = grid.place(number_)
    at_x, at_y = ticks_of(
        panel.x, panel.y, grid.width / len(panel.x), grid.height / len(panel.y), count
    )
    up = panel.y.name == "layer"
    span_y = [-0.5, len(panel.y) - 0.5]
    suffix = str(number_ + 1) if number_ else ""
    font = {"size": 12 if count == 1 else 10}
    plain = {"showgrid": False, "zeroline": False, "ticks": "", "tickfont": font, "showline": False}
    return {
        f"xaxis{suffix}": {
            **plain,
            **at_x.of(),
            "tickangle": at_x.angle,
            "range": [-0.5, len(panel.x) - 0.5],
            "domain": [canvas.x(x), min(canvas.x(x + grid.width), 1.0)],
            "anchor": f"y{suffix}",
            "showticklabels": number_ + grid.columns >= count,
        },
        f"yaxis{suffix}": {
            **plain,
            **at_y.of(),
            "tickangle": 0,
            "range": span_y if up else span_y[::-1],
            "domain": [max(canvas.y(y + grid.height), 0.0), canvas.y(y)],
            "anchor": f"x{suffix}",
            "showticklabels": number_ % grid.columns == 0,
        },
    }


def _changes(axes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each choice changes at the axes: nothing, if all of them have the same."""
    if all(options == axes[0] for options in axes):
        return [{} for _ in axes]
    parts = ("tickvals", "ticktext", "tickangle", "range")
    return [
        {f"{name}.{part}": axis[part] for name, axis in options.items() for part in parts}
        for options in axes
    ]
