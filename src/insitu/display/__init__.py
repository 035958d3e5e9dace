"""What things look like: results, circuits, recorded graphs and module trees, from plain data."""

from insitu.display.axis import Axis
from insitu.display.circuit_picture import circuit_figure
from insitu.display.graph_picture import graph_mermaid, graph_svg, graph_text

__all__ = [
    "Axis",
    "circuit_figure",
    "graph_mermaid",
    "graph_svg",
    "graph_text",
]
