"""Recorded graphs as text, as Mermaid's notation and as pictures in SVG.

They are functions here and no methods of `Graph`: a graph is plain data that travels, and does
not know what it looks like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from insitu.display.labels import shortened, visible, width
from insitu.display.layered import layers_of, place
from insitu.graph.expression import expression
from insitu.graph.node import Graph
from insitu.graph.operations import PUT

_LONGEST = 44
_FONT = 12
_CHARACTER = 0.61 * _FONT
_BOX = 26
_ROW = 56
_MARGIN = 16
_FILLS = {
    "read": "#cfe4f5",
    "operation": "#ffffff",
    "write": "#fde3c8",
    "save": "#d3efe3",
    "gradient": "#f3dcea",
}
"""The colour of each kind of node."""


@dataclass(frozen=True, slots=True)
class Box:
    """A node as it is shown.

    Attributes:
        label: what it does, with "%3" for the value of node 3.
        kind: one of "read", "operation", "write", "save" and "gradient".
        inputs: the nodes whose values it takes, each once.
        line: where the user wrote it, such as "experiment.py:12".
        text: what stands in that line.
    """

    label: str
    kind: str
    inputs: tuple[int, ...]
    line: str
    text: str

    def numbered(self, index: int, longest: int | None = None) -> str:
        """Returns what it does with the name of its value, such as "%3 = %2[0]".

        Args:
            index: its number.
            longest: how long what it does may be, in characters; None for any length.
        """
        label = self.label if longest is None else shortened(self.label, longest)
        return f"%{index}: {label}" if self.kind == "write" else f"%{index} = {label}"


def boxes(graph: Graph) -> list[Box]:
    """Returns the nodes of a graph as they are shown.

    Args:
        graph: the graph.
    """
    nodes = [*graph]
    many = len({site.invocation for node in nodes if (site := node.site) is not None}) > 1
    written = set(graph.writes.values())
    found = []
    for index, node in enumerate(nodes):
        label = expression(graph, index, 0, "%{}".format)
        site = node.site
        if many and site is not None:
            label = f"invocation {site.invocation}: {label}"
        if index in graph.stops:
            label += ", then stop"
        kind = _kind(node.operation.name)
        if kind == "operation" and (index in written or node.operation is PUT):
            kind = "write"
        location = node.location
        name = location.file.rpartition("/")[2]
        inputs = tuple(dict.fromkeys(node.inputs))
        line = f"{name}:{location.line}"
        found.append(Box("".join(map(_flat, label)), kind, inputs, line, location.text))
    return found


def graph_text(graph: Graph) -> str:
    """Returns a graph as text: a line a node, with the line of the source that recorded it.

    Args:
        graph: such as `tracer.graph`.

    Example:
        `%2 = %1.norm(dim=-1)` is node 2, which takes the value of node 1.
    """
    found = boxes(graph)
    wide = len(str(len(found) - 1))
    lines = [
        (" " * (wide - len(str(at))) + box.numbered(at), box.line) for at, box in enumerate(found)
    ]
    column = max((min(len(line), 72) for line, _ in lines), default=0)
    return "\n".join(f"{line:<{column}}  # {place}" for line, place in lines)


def graph_mermaid(graph: Graph) -> str:
    """Returns a graph in the notation of Mermaid, which GitHub and many notebooks draw.

    Args:
        graph: such as `tracer.graph`.
    """
    found = boxes(graph)
    lines = ["flowchart TD"]
    for index, box in enumerate(found):
        label = _entities(box.numbered(index, _LONGEST))
        lines.append(f'    n{index}["{label}"]:::{box.kind}')
    lines += [f"    n{n} --> n{at}" for at, box in enumerate(found) for n in box.inputs]
    used = dict.fromkeys(box.kind for box in found)
    lines += [f"    classDef {kind} fill:{_FILLS[kind]},stroke:#57606a" for kind in used]
    return "\n".join(lines)


def graph_svg(graph: Graph, most: int = 300) -> str:
    """Returns a graph as a picture in SVG, which any browser and notebook shows.

    Reads are at the top, and the values made of them below; the line of the source that recorded a
    node is shown where it is pointed at.

    Args:
        graph: such as `tracer.graph`.
        most: how many nodes are drawn, the first ones; how many there are more is said below.
    """
    found = boxes(graph)[:most]
    left = len(graph) - len(found)
    edges = [(source, at) for at, box in enumerate(found) for source in box.inputs]
    layers = layers_of(len(found), edges)
    labels = [box.numbered(at, _LONGEST) for at, box in enumerate(found)]
    widths = [width(label) * _CHARACTER + 16 for label in labels]
    layout = place(layers, edges, widths, 18)
    wide = max(layout.width + 2 * _MARGIN, 240)
    rows = max(layers, default=0) + 1
    high = rows * _ROW - (_ROW - _BOX) + 2 * _MARGIN + (24 if left else 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="0 0 {wide:.0f} {high:.0f}" role="img" aria-label="A recorded graph" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="{_FONT}">',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#57606a"/></marker>'
        "</defs>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for (source, target), route in zip(edges, layout.routes, strict=True):
        parts.append(_curve(layers[source], route, f"{source} to {target}"))
    for at, box in enumerate(found):
        x, y = layout.x[at] + _MARGIN, layers[at] * _ROW + _MARGIN
        parts.append(
            f"<g><title>{escape(f'{box.line}  {box.text}')}</title>"
            f'<rect x="{x - widths[at] / 2:.1f}" y="{y}" width="{widths[at]:.1f}" height="{_BOX}" '
            f'rx="4" fill="{_FILLS[box.kind]}" stroke="#57606a"/>'
            f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle" fill="#24292f">'
            f"{escape(labels[at])}</text></g>"
        )
    if left:
        parts.append(f'<text x="{_MARGIN}" y="{high - 12}" fill="#57606a">and {left} more</text>')
    return "\n".join([*parts, "</svg>"])


def _curve(layer: int, route: Sequence[float], name: str) -> str:
    """An edge, from the lower side of a box to the upper side of another."""
    top = layer * _ROW + _MARGIN + _BOX
    x = route[0] + _MARGIN
    drawn = [f"M{x:.1f} {top}"]
    for step, at in enumerate(route[1:]):
        low = (layer + step + 1) * _ROW + _MARGIN
        high, end = low - (_ROW - _BOX), at + _MARGIN
        middle = (low + high) / 2
        drawn.append(f"C{x:.1f} {middle} {end:.1f} {middle} {end:.1f} {low - 1}")
        if step < len(route) - 2:
            drawn.append(f"L{end:.1f} {low + _BOX}")
        x = end
    return (
        f'<path d="{" ".join(drawn)}" fill="none" stroke="#57606a" marker-end="url(#end)">'
        f"<title>%{name.replace('to ', 'to %')}</title></path>"
    )


def _kind(operation: str) -> str:
    kinds = {"read": "read", "save": "save", "write": "write", "skip": "write"}
    if operation in ("grad", "backward"):
        return "gradient"
    return kinds.get(operation, "operation")


def _flat(char: str) -> str:
    """A character that does not end a line."""
    return char if char == " " else visible(char)


def _entities(text: str) -> str:
    """A text that Mermaid takes as it is."""
    for char, entity in (("#", "#35;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        text = text.replace(char, entity)
    return text
