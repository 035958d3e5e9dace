"""Circuits as pictures: parts of a model from its first layer up, and what goes between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from insitu.display.canvas import Canvas, plotly
from insitu.display.colours import LINES
from insitu.display.labels import html, number, shortened, width
from insitu.display.layered import place
from insitu.display.ticks import CHARACTER
from insitu.graph.errors import OptionError
from insitu.graph.location import here

_NAME = 22
_ROW = 78
_BOX = 24
_FILLS = ("#cfe4f5", "#fde3c8", "#d3efe3", "#f3dcea", "#e6e6e6", "#fdf3c4", "#dcd9f3", "#e9dfd3")
_STRENGTHS = 4


class Node(NamedTuple):
    """A part of a model.

    Attributes:
        name: what it is called, such as "3.head.5"; each has a name of its own.
        layer: where it stands, the lowest first. Those of one layer that lead to each other stand
            above each other.
        kind: what it is, such as "head" or "mlp": those of a kind have one colour. A part of no
            kind, such as the embedding, stands beside no number of a layer.
    """

    name: str
    layer: int
    kind: str = ""


class Arrow(NamedTuple):
    """An edge of a circuit as it is drawn: what goes from one part to another.

    Attributes:
        source: the name of the part that it comes from.
        target: the name of the part that it goes to.
        score: how much it matters; its sign has a colour, and its size is how thick it is.
    """

    source: str
    target: str
    score: float = 1.0


def circuit_figure(
    nodes: Sequence[Node],
    edges: Sequence[Arrow],
    *,
    title: str = "Circuit",
    quantity: str = "score",
    most: int = 200,
) -> Any:
    """Returns a circuit as a figure of plotly.

    Args:
        nodes: its parts.
        edges: what goes between them.
        title: what stands over it.
        quantity: what a score is.
        most: how many edges are drawn: those with the largest scores. How many there are more
            stands in the title.

    Raises:
        OptionError: if an edge names a part that there is not, or goes back to an earlier layer
            or in a circle, or two parts have one name.
        MissingPackageError: if plotly is not installed.
    """
    go = plotly()
    at = {node.name: number_ for number_, node in enumerate(nodes)}
    if len(at) < len(nodes) or not nodes:
        raise OptionError(
            "The parts of a circuit have a name each, and there is one at least.", here()
        )
    drawn = sorted(edges, key=lambda edge: -abs(edge.score))[:most]
    pairs = [*_pairs(drawn, at)]
    if len(drawn) < len(edges):
        title = f"{title} (the {len(drawn)} strongest of {len(edges)} edges)"
    rows = _rows(nodes, pairs)
    names = [shortened(node.name, _NAME) for node in nodes]
    widths = [width(name) * CHARACTER * 12 + 18 for name in names]
    layout = place(rows, pairs, widths, 18)
    count = max(rows) + 1
    kinds = [*dict.fromkeys(node.kind for node in nodes)]
    canvas = Canvas(title, max(layout.width, 260), count * _ROW, left=76)
    legend = [kind for kind in kinds if kind]
    canvas.right = 60 + max([width(shortened(k, 20)) for k in legend] + [9]) * CHARACTER * 12
    shift = (canvas.width - layout.width) / 2
    traces = [*_lines(go, drawn, pairs, layout.routes, rows, shift, quantity)]
    for index, kind in enumerate(legend):
        marker = {"symbol": "square", "size": 12, "color": _FILLS[index % len(_FILLS)]}
        marker["line"] = {"width": 1, "color": "#57606a"}
        name = html(shortened(kind, 20))
        traces.append(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name))
    for index, node in enumerate(nodes):
        fill = _FILLS[legend.index(node.kind) % len(_FILLS)] if node.kind else "#ffffff"
        canvas.annotations.append(
            {
                "x": layout.x[index] + shift,
                "y": rows[index],
                "text": html(names[index]),
                "showarrow": False,
                "bgcolor": fill,
                "bordercolor": "#57606a",
                "borderwidth": 1,
                "width": round(widths[index] - 8),
                "height": _BOX - 6,
                "hovertext": "<br>".join(map(html, _said(node, drawn))),
            }
        )
    heights: dict[int, list[int]] = defaultdict(list)
    blocks = {node.layer for node in nodes if node.kind}  # not what is before and behind them
    for node, row in zip(nodes, rows, strict=True):
        if node.layer in blocks or not blocks:
            heights[node.layer].append(row)
    places = {layer: (min(some) + max(some)) / 2 for layer, some in heights.items()}
    bare = {"showgrid": False, "zeroline": False, "ticks": "", "showline": False}
    figure = go.Figure(traces)
    figure.update_layout(
        canvas.layout(
            xaxis={**bare, "showticklabels": False, "range": [0, canvas.width]},
            yaxis={
                **bare,
                "range": [-0.5, count - 0.5],
                "tickvals": [*places.values()],
                "ticktext": [f"layer {layer}" for layer in places],
            },
            legend={"x": canvas.x(canvas.width + 12), "xanchor": "left", "y": 1, "yanchor": "top"},
            hovermode="closest",
        )
    )
    return figure


def _pairs(edges: Sequence[Arrow], at: dict[str, int]) -> Iterator[tuple[int, int]]:
    for edge in edges:
        for name in (edge.source, edge.target):
            if name not in at:
                raise OptionError(
                    f"An edge of the circuit names {name!r}, which is no part.", here()
                )
        yield at[edge.source], at[edge.target]


def _rows(nodes: Sequence[Node], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The row of each node, from 0: by layer, and in one layer by what leads to what."""
    depth = [0] * len(nodes)
    inside = []
    for source, target in pairs:
        if nodes[source].layer > nodes[target].layer or source == target:
            raise OptionError(
                f"The edge from {nodes[source].name!r} to {nodes[target].name!r} goes back: edges "
                "of a circuit go from an earlier layer to a later one.",
                here(),
            )
        if nodes[source].layer == nodes[target].layer:
            inside.append((source, target))
    for _ in range(len(nodes)):
        changed = False
        for source, target in inside:
            if depth[target] <= depth[source]:
                depth[target], changed = depth[source] + 1, True
        if not changed:
            break
    else:
        raise OptionError("Edges within a layer of the circuit go in a circle.", here())
    # Those of a kind stand in one row of their layer, if edges let them.
    highest: dict[str, int] = defaultdict(int)
    for node, below in zip(nodes, depth, strict=True):
        highest[node.kind] = max(highest[node.kind], below)
    even = [highest[node.kind] for node in nodes]
    if all(even[source] < even[target] for source, target in inside):
        depth = even
    steps = sorted({(node.layer, below) for node, below in zip(nodes, depth, strict=True)})
    row = {step: number_ for number_, step in enumerate(steps)}
    return [row[node.layer, below] for node, below in zip(nodes, depth, strict=True)]


def _lines(
    go: Any,
    edges: Sequence[Arrow],
    pairs: Sequence[tuple[int, int]],
    routes: Sequence[Sequence[float]],
    rows: Sequence[int],
    shift: float,
    quantity: str,
) -> Iterator[Any]:
    """The edges, one trace for those of a sign and a strength, and the text of each."""
    largest = max((abs(edge.score) for edge in edges), default=0.0) or 1.0
    groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
    for index, edge in enumerate(edges):
        strength = min(int(abs(edge.score) / largest * _STRENGTHS), _STRENGTHS - 1)
        groups[edge.score < 0, strength].append(index)
    named: set[bool] = set()
    for (negative, strength), some in sorted(groups.items(), key=lambda item: item[0]):
        x: list[float | None] = []
        y: list[float | None] = []
        for index in some:
            first = rows[pairs[index][0]]
            x += [*(at + shift for at in routes[index]), None]
            y += [*(float(first + step) for step in range(len(routes[index]))), None]
        yield go.Scatter(
            x=x,
            y=y,
            mode="lines",
            line={
                "color": LINES[1] if negative else LINES[0],
                "width": 1 + strength * 1.5,
                "shape": "spline",
                "smoothing": 0.6,
            },
            opacity=0.45 + 0.15 * strength,
            hoverinfo="skip",
            name="negative" if negative else "positive",
            legendgroup=str(negative),
            showlegend=negative not in named,
        )
        named.add(negative)
    yield go.Scatter(
        x=[sum(route[:2]) / 2 + shift for route in routes],
        y=[rows[source] + 0.5 for source, _ in pairs],
        mode="markers",
        marker={"opacity": 0, "size": 12},
        hoverinfo="text",
        hovertext=[
            html(f"{edge.source} → {edge.target}: {quantity} {number(edge.score)}")
            for edge in edges
        ],
        showlegend=False,
    )


def _said(node: Node, edges: Sequence[Arrow]) -> list[str]:
    """The text of a part that is pointed at: what goes in and out, the strongest first."""
    said = [node.name]
    incoming = [edge for edge in edges if edge.target == node.name][:5]
    outgoing = [edge for edge in edges if edge.source == node.name][:5]
    said += [f"from {edge.source}: {number(edge.score)}" for edge in incoming]
    return said + [f"to {edge.target}: {number(edge.score)}" for edge in outgoing]
