"""Pictures as files: pages that need no network, and PNG, SVG and PDF."""

from __future__ import annotations

import os
import re
from base64 import b64encode
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from insitu import disk
from insitu.display.canvas import plotly
from insitu.display.figure import figure
from insitu.display.graph_picture import graph_mermaid, graph_svg, graph_text
from insitu.display.numbers import Numbers
from insitu.display.table import table
from insitu.graph.errors import InsituError, MissingPackageError, OptionError
from insitu.graph.location import here
from insitu.graph.node import Graph

_FORMS = ("png", "svg", "pdf")


class PictureError(InsituError, RuntimeError):
    """A picture that could not be written to a file."""


def write_html(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a page that can be opened without a network.

    Args:
        figure: a figure of plotly.
        path: where to.
    """
    options = {"displaylogo": False, "responsive": False}
    disk.write(path, figure.to_html(include_plotlyjs=True, config=options))


def write_png(figure: Any, path: str | os.PathLike[str], scale: float = 2) -> None:
    """Writes a figure as a PNG, drawn by Chromium.

    Args:
        figure: a figure of plotly.
        path: where to.
        scale: how many of the file's pixels one of the figure's is wide.

    Raises:
        OptionError: if the file's name ends as that of another kind of picture.
        MissingPackageError: if Kaleido is not installed.
        PictureError: if it finds no Chromium.
    """
    if Path(path).suffix.lower() in (".svg", ".pdf"):
        raise OptionError(
            f"{os.fspath(path)!r} is no name for a PNG: write other pictures with `to_picture`.",
            here(),
        )
    _write_drawn(figure, path, "png", scale)


def write_picture(figure: Any, path: str | os.PathLike[str], scale: float = 2) -> None:
    """Writes a figure as a picture, drawn by Chromium, in the form that the file's name ends in.

    Args:
        figure: a figure of plotly.
        path: where to: ".png", or ".svg" or ".pdf", which are made of lines and letters and can
            be scaled.
        scale: how many pixels of a PNG one of the figure's is wide.

    Raises:
        OptionError: if the name ends in something else.
        MissingPackageError: if Kaleido is not installed.
        PictureError: if it finds no Chromium.
    """
    form = picture_form(path)
    _write_drawn(figure, path, form, scale if form == "png" else 1)


def picture_form(path: str | os.PathLike[str]) -> str:
    """Returns the form of a picture by the ending of its file's name: "png", "svg" or "pdf".

    Args:
        path: the file.

    Raises:
        OptionError: if the name ends in something else.
    """
    form = Path(path).suffix.lower().removeprefix(".")
    if form not in _FORMS:
        raise OptionError(
            f"A picture is written to a file whose name ends in .png, .svg or .pdf, not to "
            f"{os.fspath(path)!r}.",
            here(),
        )
    return form


def check_drawing() -> None:
    """Raises if what draws pictures is not installed. Whether there is a Chromium is seen later.

    Raises:
        MissingPackageError: in that case.
    """
    if find_spec("kaleido") is None:
        raise MissingPackageError(
            "Pictures take Kaleido, which is not installed: `pip install 'insitu[plot]'`.", here()
        )


def _write_drawn(figure: Any, path: str | os.PathLike[str], form: str, scale: float) -> None:
    disk.check_target(path)  # before the time that drawing takes
    check_drawing()
    try:
        size = {"width": figure.layout.width, "height": figure.layout.height}
        data = figure.to_image(format=form, scale=scale, **size)
    except Exception as error:  # Kaleido's own, or plotly's, or that of a process which ended
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PictureError(
            f"No {form.upper()} could be drawn: {said} It takes Chromium or Chrome: install "
            "one, say where it is with the environment variable BROWSER_PATH, or write a page with "
            "`to_html`.",
            here(),
        ) from error
    disk.write(path, data)


def svg_figure(svg: str) -> Any:
    """Returns a picture in SVG as a figure of plotly, which `write_png` takes.

    Args:
        svg: the picture, with its width and height in pixels.

    Raises:
        MissingPackageError: if plotly is not installed.
    """
    found = re.search(r'<svg[^>]* width="([\d.]+)"[^>]* height="([\d.]+)"', svg)
    assert found is not None
    wide, high = map(float, found.groups())
    source = "data:image/svg+xml;base64," + b64encode(svg.encode()).decode()
    bare = {"visible": False, "range": [0, 1], "fixedrange": True}
    figure = plotly().Figure()
    figure.update_layout(
        width=round(wide),
        height=round(high),
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        xaxis=bare,
        yaxis=bare,
        images=[{"source": source, "x": 0, "y": 1, "sizex": 1, "sizey": 1, "sizing": "stretch"}],
    )
    return figure


def write_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Writes a recorded graph to a file, in the form that the file's name ends in.

    Args:
        graph: such as `tracer.graph`.
        path: where to: ".txt" for text, ".mmd" for Mermaid's notation, ".svg", ".html", or ".png",
            which takes Chromium.

    Raises:
        OptionError: if the name ends in something else.
        MissingPackageError: of PNGs, if plotly or Kaleido is not installed.
        PictureError: of PNGs, if there is no Chromium.
    """
    ending = Path(path).suffix
    if ending == ".png":
        write_png(svg_figure(graph_svg(graph)), path)
        return
    forms = {
        ".txt": graph_text,
        ".mmd": graph_mermaid,
        ".svg": graph_svg,
        ".html": lambda graph: f"<!DOCTYPE html>\n<title>Graph</title>\n{graph_svg(graph)}",
    }
    if ending not in forms:
        raise OptionError(
            f"A graph is written to a file that ends in {', '.join(map(repr, forms))} or '.png', "
            f"not {ending!r}.",
            here(),
        )
    disk.write(path, forms[ending](graph))


def for_notebook(numbers: Numbers) -> str:
    """Returns numbers as HTML for a notebook: a picture, or a table where there is no plotly.

    Args:
        numbers: what to show.
    """
    try:
        return figure(numbers)._repr_html_()  # with what the notebook has of plotly.js
    except InsituError:
        return _as_table(numbers)


def _as_table(numbers: Numbers) -> str:
    from rich.console import Console

    console = Console(width=100, record=True, file=StringIO(), force_terminal=True)
    console.print(table(numbers, 100))
    style = "font-family:Menlo,'DejaVu Sans Mono',consolas,monospace;line-height:1.2"
    return console.export_html(
        inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>'
    )
