"""What things look like: results, circuits, recorded graphs and module trees, from plain data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insitu.display.axis import Axis
    from insitu.display.circuit_picture import circuit_figure
    from insitu.display.graph_picture import graph_mermaid, graph_svg, graph_text
    from insitu.display.page import write_graph

__all__ = [
    "Axis",
    "circuit_figure",
    "graph_mermaid",
    "graph_svg",
    "graph_text",
    "write_graph",
]

# `import insitu` comes by here for what is printed, and takes no pictures.
_PLACES = {
    "Axis": "axis",
    "circuit_figure": "circuit_picture",
    "graph_mermaid": "graph_picture",
    "graph_svg": "graph_picture",
    "graph_text": "graph_picture",
    "write_graph": "page",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
