"""Colours of numbers, for pictures and for terminals alike.

Both scales can be told apart by people who do not see all colours, and in grey: one goes from light
to dark, the other from red over white to blue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Colour = tuple[int, int, int]

# "YlGnBu" of ColorBrewer (Harrower and Brewer 2003).
SEQUENTIAL: tuple[Colour, ...] = (
    (255, 255, 217),
    (237, 248, 177),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (37, 52, 148),
    (8, 29, 88),
)
# "RdBu" of the same.
DIVERGING: tuple[Colour, ...] = (
    (178, 24, 43),
    (214, 96, 77),
    (244, 165, 130),
    (253, 219, 199),
    (247, 247, 247),
    (209, 229, 240),
    (146, 197, 222),
    (67, 147, 195),
    (33, 102, 172),
)
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5c5c5c", "#8c6d00")
"""Colours of things that are told apart by them (Okabe and Ito 2008, darkened for white)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Which colour stands for which number.

    Attributes:
        colours: from that of the lowest to that of the highest, in even steps.
        low: the lowest number.
        high: the highest.
    """

    colours: Sequence[Colour]
    low: float
    high: float

    def colour(self, value: float) -> Colour:
        """Returns the colour of a number; those outside of the scale have that of its end."""
        share = (value - self.low) / (self.high - self.low)
        place = min(max(share, 0.0), 1.0) * (len(self.colours) - 1)
        before = min(int(place), len(self.colours) - 2)
        rest = place - before
        pairs = zip(self.colours[before], self.colours[before + 1], strict=True)
        red, green, blue = (round(a + (b - a) * rest) for a, b in pairs)
        return red, green, blue

    def ticks(self, most: int) -> list[float]:
        """Returns round numbers on the scale, in even steps.

        Args:
            most: how many, about.
        """
        rough = (self.high - self.low) / max(most, 1)
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [at * step for at in range(first, last + 1)]

    def steps(self) -> list[tuple[float, str]]:
        """Returns its colours with their places from 0 to 1, as plotly takes them."""
        last = len(self.colours) - 1
        return [(at / last, css(colour)) for at, colour in enumerate(self.colours)]


def scale_of(values: Sequence[float], centre: float | None, whole: bool = False) -> Scale:
    """Returns a scale for numbers.

    Args:
        values: the numbers; those that are not finite do not count.
        centre: the number at which colours turn, which is then in the middle; None if there is
            none.
        whole: whether it begins at 0 if no number is below.
    """
    found = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(found), max(found)
    if centre is not None:
        reach = max(high - centre, centre - low) or 1.0
        return Scale(DIVERGING, centre - reach, centre + reach)
    if whole and low > 0:
        low = 0.0
    return Scale(SEQUENTIAL, low, high if high > low else low + 1.0)


def css(colour: Colour) -> str:
    """Returns a colour as "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def on(colour: Colour) -> str:
    """Returns the colour of text on a colour: black or white, whichever stands out more."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in colour)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.18 else "#ffffff"
