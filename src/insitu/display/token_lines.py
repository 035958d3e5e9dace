"""Several texts under each other whose tokens have the colours of numbers: examples of a feature.

One text with a choice of many is the business of `token_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from insitu.display.canvas import MONOSPACE, Canvas, plotly
from insitu.display.colours import Scale, css, on, scale_of
from insitu.display.labels import html, number, shortened, visible, width
from insitu.display.menu import colour_axis
from insitu.display.token_text import token_row

if TYPE_CHECKING:
    from rich.console import RenderableType

_FONT = 13
_CHARACTER = 0.61 * _FONT
_LINE = 26
_LABEL = 80
_LONGEST = 40


@dataclass(frozen=True, slots=True)
class TokenLine:
    """A text with a number for each token.

    Attributes:
        label: what stands before it.
        tokens: the tokens.
        values: their numbers.
    """

    label: str
    tokens: Sequence[str]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class TokenLines:
    """Texts under a title, which share a scale of colours.

    Attributes:
        title: the title.
        lines: the texts.
    """

    title: str
    lines: Sequence[TokenLine]

    @property
    def scale(self) -> Scale:
        """Which colour stands for which number: 0 has the lightest."""
        return scale_of([value for line in self.lines for value in line.values], None, whole=True)


def printed_lines(groups: Sequence[TokenLines]) -> RenderableType:
    """Returns texts as coloured words for a terminal."""
    from rich.console import Group  # of use to terminals only
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for group in groups:
        scale = group.scale
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(justify="right", style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for line in group.lines:
            text = Text()
            for token, value in zip(line.tokens, line.values, strict=True):
                text.append(_plain(token), style=_style(scale, value))
            table.add_row(Text(line.label), text)
        parts += [Text(group.title, style="bold"), table]
        if not group.lines:
            parts.append(Text("  no examples", style="dim"))
    return Group(*parts)


def lines_html(groups: Sequence[TokenLines]) -> str:
    """Returns texts as HTML, for notebooks."""
    parts = [f'<div style="font-family:{MONOSPACE.replace(chr(39), "")};font-size:{_FONT}px">']
    for group in groups:
        scale = group.scale
        parts.append(f"<p><b>{escape(group.title)}</b></p><table>")
        for line in group.lines:
            spans = [
                f'<span title="{number(value)}" style="{_css(scale, value)}">'
                f"{escape(_plain(token))}</span>"
                for token, value in zip(line.tokens, line.values, strict=True)
            ]
            cell = '<td style="text-align:left;white-space:pre-wrap">'
            parts.append(f"<tr><td>{escape(line.label)}</td>{cell}{''.join(spans)}</td></tr>")
        parts.append("</table>" if group.lines else "</table><p>no examples</p>")
    return "".join([*parts, "</div>"])


def lines_figure(group: TokenLines, title: str | None = None, wide: float | None = None) -> Any:
    """Returns texts under each other as a figure of plotly.

    Args:
        group: the texts.
        title: what stands over them; None for their own title.
        wide: how wide the whole is, in pixels; None for what suits it.

    Raises:
        MissingPackageError: if plotly is not installed.
    """
    go = plotly()
    shown = [[shortened(visible(token), _LONGEST) for token in line.tokens] for line in group.lines]
    ends = [_edges(tokens) for tokens in shown]
    room = max([300.0, *(edges[-1] for edges in ends)])
    room = room if wide is None else wide - _LABEL - 100
    canvas = Canvas(
        group.title if title is None else title,
        room,
        max(len(shown) * _LINE, 100.0),
        left=_LABEL,
        right=100,
    )
    traces: list[Any] = []
    for row, (line, tokens, edges) in enumerate(zip(group.lines, shown, ends, strict=True)):
        canvas.text(line.label, -8, (row + 0.5) * _LINE, xanchor="right", yanchor="middle")
        said = [
            f"{html(visible(token))}<br>{number(value)}"
            for token, value in zip(line.tokens, line.values, strict=True)
        ]
        traces.append(token_row(row, edges, tokens, line.values, said, _FONT))
    bare = {"showgrid": False, "zeroline": False, "showticklabels": False, "ticks": ""}
    figure = go.Figure(traces)
    figure.update_layout(
        canvas.layout(
            xaxis={**bare, "range": [0, room]},
            yaxis={**bare, "range": [canvas.height / _LINE, 0]},
            coloraxis=colour_axis(group.scale, "activation", canvas),
            showlegend=False,
        )
    )
    return figure


def _edges(tokens: Sequence[str]) -> list[float]:
    edges = [0.0]
    for token in tokens:
        edges.append(edges[-1] + width(token) * _CHARACTER + 6)
    return edges


def _plain(token: str) -> str:
    """A token with its own spaces, and nothing that would break a line or a terminal."""
    return "".join(char if char == " " else visible(char) for char in token)


def _style(scale: Scale, value: float) -> str:
    if not value > 0:
        return ""
    colour = scale.colour(value)
    return f"{on(colour)} on {css(colour)}"


def _css(scale: Scale, value: float) -> str:
    if not value > 0:
        return ""
    colour = scale.colour(value)
    return f"color:{on(colour)};background:{css(colour)}"
