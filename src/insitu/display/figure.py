"""From numbers to a picture, chosen by the axes that they have."""

from __future__ import annotations

from typing import Any, Literal, get_args

from insitu.display.heat_map import heat_map
from insitu.display.numbers import Numbers, arrange
from insitu.display.series import is_curve, series
from insitu.display.token_text import token_text
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here

Kind = Literal["heat map", "bars", "line", "text"]


def figure(
    numbers: Numbers,
    kind: Kind | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    grid: str | None = None,
    in_cells: bool | None = None,
    title: str | None = None,
    width: float | None = None,
    height: float | None = None,
) -> Any:
    """Returns numbers as a figure of plotly.

    Args:
        numbers: what to draw.
        kind: "heat map" of two axes or more; "bars" or a "line" along one axis, of two one for each
            entry of the other. "text" is a prompt whose tokens have the numbers' colours. None for
            what suits the axes.
        x: the name of the axis from left to right.
        y: of a heat map, the axis at its side.
        grid: of a heat map, the axis whose entries are all drawn, a panel each. Of axes that are
            left one entry is shown, and another can be chosen.
        in_cells: of a heat map, whether texts, or numbers where there are none, stand in the
            cells; None for where they are few enough.
        title: what stands over it; None for the numbers' own title.
        width: of the whole, in pixels; None for what suits it.
        height: of the whole, in pixels; None for what suits it.

    Raises:
        OptionError: if an option has no meaning for these numbers.
        MissingPackageError: if plotly is not installed.
    """
    axes = numbers.axes
    title = numbers.title if title is None else title
    if kind is not None and kind not in get_args(Kind):
        kinds = ", ".join(map(repr, get_args(Kind)))
        raise OptionError(
            f"There is no kind {kind!r} of picture{nearest(kind, get_args(Kind))}: there are "
            f"{kinds}.",
            here(),
        )
    if not numbers.values.numel():
        raise OptionError(f"{numbers.title!r} has no numbers to draw.", here())
    for name in (x, y, grid):
        if name is not None and name not in [axis.name for axis in axes]:
            names = [axis.name for axis in axes]
            raise OptionError(
                f"There is no axis {name!r} to draw{nearest(name, names)}: there are "
                f"{', '.join(map(repr, names)) or 'none'}.",
                here(),
            )
    if kind is None:
        kind = "heat map"
        if len(axes) < 2:
            kind = "line" if axes and is_curve(axes[0]) else "bars"
    if kind == "text":
        return token_text(numbers, title, (width, height))
    if kind in ("bars", "line"):
        if len(axes) > 2:
            raise OptionError(
                f"A picture of kind {kind!r} has one axis or two, and there are {len(axes)}: "
                "choose with `select`, or take a `mean`.",
                here(),
            )
        return series(numbers, x, kind == "line", title, (width, height))
    if len(axes) < 2:
        raise OptionError("A heat map has two axes or more: draw 'bars' or a 'line'.", here())
    if grid is not None and len(axes) < 3:
        raise OptionError(
            f"A grid of heat maps has two axes beside that of its panels, {grid!r}: leave `grid` "
            "out.",
            here(),
        )
    return heat_map(numbers, arrange(axes, y, x, grid), title, in_cells, (width, height))
