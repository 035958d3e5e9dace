"""The canvas of a picture: its size, margins, title and fonts, in pixels.

Everything is placed by numbers known beforehand, not by what a browser finds out, so that a
picture in a page and one in a file are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from insitu.display.labels import html, wrapped
from insitu.display.ticks import CHARACTER
from insitu.graph.errors import MissingPackageError
from insitu.graph.location import here

FONT = "Open Sans, Verdana, Arial, sans-serif"
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
INK = "#24292f"
EMPTY = "#e6e6e6"
"""The colour of what has no number."""

_TITLE = 16
_NARROWEST = 320


def plotly() -> Any:
    """Returns plotly's `graph_objects`.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError:
        raise MissingPackageError(
            "Pictures take plotly, which is not installed: `pip install 'insitu[plot]'`.", here()
        ) from None
    return plotly.graph_objects


@dataclass(slots=True)
class Canvas:
    """Where things are in a picture.

    Attributes:
        title: what stands over it.
        width: of the part in which numbers are drawn, in pixels.
        height: of that part.
        left: the room beside it, for labels.
        right: the room on its right.
        above: the room above it, without the title.
        below: the room below it.
        over: the room above that, for a list to choose from.
        under: the room below all, for a slider.
        annotations: texts that stand somewhere, as plotly takes them.
    """

    title: str
    width: float
    height: float
    left: float = 12
    right: float = 24
    above: float = 12
    below: float = 12
    over: float = 0
    under: float = 0
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def x(self, pixels: float) -> float:
        """Returns the place, in plotly's units, so many pixels right of the left edge."""
        return pixels / self.width

    def y(self, pixels: float) -> float:
        """Returns the place, in plotly's units, so many pixels below the upper edge."""
        return 1 - pixels / self.height

    def text(self, text: str, x: float, y: float, **options: Any) -> None:
        """Puts a text somewhere.

        Args:
            text: the text.
            x: where it is, in pixels from the left edge.
            y: in pixels below the upper edge.
            options: of plotly.
        """
        place = {"x": self.x(x), "y": self.y(y), "xref": "paper", "yref": "paper"}
        self.annotations.append({"text": html(text), **place, "showarrow": False, **options})

    def label_axes(self, x: str, y: str) -> None:
        """Puts the names of the axes at the outer edges."""
        low, left = self.height + self.below - 4, -self.left + 4
        self.text(x, self.width / 2, low, xanchor="center", yanchor="bottom")
        self.text(y, left, self.height / 2, textangle=-90, xanchor="left", yanchor="middle")

    def layout(self, **options: Any) -> dict[str, Any]:
        """Returns it as plotly's layout, with further options."""
        wide = max(self.left + self.width + self.right, _NARROWEST)
        right = wide - self.left - self.width
        lines = wrapped(self.title, int((wide - 24) / (_TITLE * CHARACTER)))
        top = 14 + len(lines) * _TITLE * 1.35 + self.above + self.over
        # Plotly's own title is cut off if it has several lines.
        title = {
            "name": "title",
            "text": "<br>".join(map(html, lines)),
            "font": {"size": _TITLE},
            "showarrow": False,
            "align": "left",
            **{"x": self.x(12 - self.left), "xref": "paper", "xanchor": "left"},
            **{"y": self.y(8 - top), "yref": "paper", "yanchor": "top"},
        }
        return {
            "width": round(wide),
            "height": round(top + self.height + self.below + self.under),
            "margin": {
                "l": self.left,
                "r": right,
                "t": top,
                "b": self.below + self.under,
                "pad": 0,
                "autoexpand": False,
            },
            "font": {"family": FONT, "size": 12, "color": INK},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "annotations": [*self.annotations, title],
            "hoverlabel": {"align": "left", "namelength": 0},
            "template": "none",
            **options,
        }
