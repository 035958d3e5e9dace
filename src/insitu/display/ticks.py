"""Ticks: which labels stand at an axis, and at which angle, so that none lies on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from insitu.display.axis import Axis
from insitu.display.labels import html, labels_of, numbered, width

CHARACTER = 0.62
"""How wide a character is at most, on average, in units of the size of the font."""
_LINE = 1.3
_DIAGONAL = 0.7072


@dataclass(frozen=True, slots=True)
class Ticks:
    """The labels at an axis.

    Attributes:
        places: the indices at which there is one.
        labels: the label of each.
        angle: of the text, in degrees clockwise.
        room: how much room they take beside the axis, in pixels.
        before: how far they reach beyond its beginning.
    """

    places: Sequence[int]
    labels: Sequence[str]
    angle: int = 0
    room: float = 0
    before: float = 0

    def of(self) -> dict[str, object]:
        """Returns them as options of an axis of plotly."""
        return {"tickvals": [*self.places], "ticktext": [*map(html, self.labels)]}


def along_x(axis: Axis, step: float, font: float = 12, longest: int = 14) -> Ticks:
    """Returns the ticks of an axis from left to right.

    Args:
        axis: the axis.
        step: from one of its entries to the next, in pixels.
        font: the size of the font, in pixels.
        longest: how long labels may be, in characters.
    """
    labels = labels_of(axis, longest)
    widest = max((width(label) for label in labels), default=0) * CHARACTER * font
    line = font * _LINE
    if widest + font * 0.5 <= step:
        return _every(labels, 1, 0, line)
    if numbered(labels):
        return _every(labels, ceil((widest + font * 0.5) / step), 0, line)
    if step * _DIAGONAL >= line:
        reach = (widest + line) * _DIAGONAL
        return _every(labels, 1, -45, reach, reach)
    return _every(labels, ceil(line / step), -90, widest + 4)


def along_y(axis: Axis, step: float, font: float = 12, longest: int = 24) -> Ticks:
    """Returns the ticks of an axis from bottom to top, or from top to bottom: see `along_x`."""
    labels = labels_of(axis, longest)
    widest = max((width(label) for label in labels), default=0) * CHARACTER * font
    return _every(labels, ceil(font * _LINE / step), 0, widest + 4)


def _every(labels: Sequence[str], step: int, angle: int, room: float, before: float = 0) -> Ticks:
    """Ticks at every so manieth entry; of many, at a number that one counts by."""
    step = next((n * k for k in (1, 10, 100, 1000) for n in (1, 2, 5) if n * k >= step), step)
    places = range(0, len(labels), step)
    return Ticks(places, [labels[place] for place in places], angle, room, before)
