"""Pictures as files: pages that need no network, and PNGs."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path
from typing import Any

from insitu.display.figure import figure
from insitu.display.numbers import Numbers
from insitu.display.table import table
from insitu.graph.errors import InsituError, MissingPackageError
from insitu.graph.location import here


class PictureError(InsituError, RuntimeError):
    """A picture that could not be written to a file."""


def write_html(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a page that can be opened without a network.

    Args:
        figure: a figure of plotly.
        path: where to.
    """
    options = {"displaylogo": False, "responsive": False}
    figure.write_html(os.fspath(path), include_plotlyjs=True, config=options)


def write_png(figure: Any, path: str | os.PathLike[str], scale: float = 2) -> None:
    """Writes a figure as a PNG, drawn by Chromium.

    Args:
        figure: a figure of plotly.
        path: where to.
        scale: how many of the file's pixels one of the figure's is wide.

    Raises:
        MissingPackageError: if Kaleido is not installed.
        PictureError: if it finds no Chromium.
    """
    try:
        import kaleido  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingPackageError(
            "PNGs take Kaleido, which is not installed: `pip install 'insitu[plot]'`.", here()
        ) from None
    try:
        size = {"width": figure.layout.width, "height": figure.layout.height}
        data = figure.to_image(format="png", scale=scale, **size)
    except Exception as error:  # Kaleido's own, or plotly's, or that of a process which ended
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise PictureError(
            f"No PNG could be drawn: {said} It takes Chromium or Chrome: install one, say where it "
            "is with the environment variable BROWSER_PATH, or write a page with `to_html`.",
            here(),
        ) from error
    Path(path).write_bytes(data)


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
