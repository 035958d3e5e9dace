"""Output of a terminal as a file: tables, trees and text as a page or a picture.

Numbers with axes have pictures of their own: see `insitu.display.page`.
"""

from __future__ import annotations

import os
from io import StringIO
from typing import TYPE_CHECKING

from insitu import disk
from insitu.display.canvas import INK, MONOSPACE
from insitu.display.page import picture_form, svg_figure, write_picture

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.terminal_theme import TerminalTheme

_ROOM = 140  # how many characters wide what is printed may be
_CHARACTER = 12.2  # how wide rich draws one, in pixels
_LETTER = 0.65  # what a pixel of rich's letters becomes, for them to be as large as elsewhere
_MARGIN = 16
_SCALE = 2
_TALLEST = 30_000  # pixels of a file: of more, Chromium draws nothing

_PAGE = f"""<!DOCTYPE html>
<html>
<head><meta charset="UTF-8"><title>Insitu</title></head>
<body style="margin:{_MARGIN}px;color:{{foreground}};background:{{background}}">
<pre style="font:13px/1.3 {MONOSPACE.replace("'", '"')};margin:0">{{code}}</pre>
</body>
</html>
"""
# rich's own looks like a window on a desktop, and takes its letters from the network.
_SVG = f"""<svg xmlns="http://www.w3.org/2000/svg" width="WIDTH" height="HEIGHT">
<style>
.{{unique_id}}-matrix {{{{ font: 20px {MONOSPACE}; }}}}
{{styles}}
</style>
<defs>{{lines}}</defs>
<rect width="100%" height="100%" fill="white"/>
<g transform="translate({_MARGIN},{_MARGIN}) scale({_LETTER})">
{{backgrounds}}<g class="{{unique_id}}-matrix">{{matrix}}</g>
</g>
</svg>"""


def write_printed_html(shown: RenderableType, path: str | os.PathLike[str]) -> None:
    """Writes something as a page that can be opened without a network.

    Args:
        shown: what rich can print.
        path: where to.
    """
    page = _recorded(shown).export_html(theme=_theme(), inline_styles=True, code_format=_PAGE)
    disk.write(path, page)


def write_printed_picture(shown: RenderableType, path: str | os.PathLike[str]) -> None:
    """Writes something as a picture, in the form that the file's name ends in.

    An SVG needs nothing else. PNG and PDF are drawn by Chromium.

    Args:
        shown: what rich can print.
        path: where to: ".png", ".svg" or ".pdf".

    Raises:
        OptionError: if the name ends in something else.
        MissingPackageError: if plotly or Kaleido is not installed.
        PictureError: if there is no Chromium.
    """
    from rich.cells import cell_len

    form = picture_form(path)
    console = _recorded(shown)
    lines = console.export_text(clear=False).splitlines()
    widest = max((cell_len(line.rstrip()) for line in lines), default=0)
    wide = widest * _CHARACTER * _LETTER + 2 * _MARGIN
    high = len(lines) * 20 * 1.22 * _LETTER + 2 * _MARGIN
    size = _SVG.replace("WIDTH", f"{wide:.0f}").replace("HEIGHT", f"{high:.0f}")
    svg = console.export_svg(theme=_theme(), code_format=size, unique_id="printed")
    if form == "svg":
        disk.write(path, svg)
        return
    write_picture(svg_figure(svg), path, min(_SCALE, _TALLEST / high))


def _recorded(shown: RenderableType) -> Console:
    from rich.console import Console

    console = Console(file=StringIO(), record=True, width=_ROOM, force_terminal=True)
    console.print(shown)
    return console


def _theme() -> TerminalTheme:
    """Colours for white paper, dark enough to be read."""
    from rich.terminal_theme import TerminalTheme

    ink: tuple[int, int, int] = tuple(bytes.fromhex(INK[1:]))  # pyright: ignore[reportAssignmentType]
    plain = [(36, 41, 47), (207, 34, 46), (17, 99, 41), (125, 78, 0), (9, 105, 218)]
    plain += [(130, 80, 223), (27, 124, 131), (110, 119, 129)]
    return TerminalTheme((255, 255, 255), ink, plain)
