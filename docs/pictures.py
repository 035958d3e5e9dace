"""The pictures of this site: a block of a page that ends in a figure is followed by that figure.

MkDocs calls the functions here while it builds (`hooks` in mkdocs.yml). They run the blocks of a
page in order, up to the last one that ends in `result.plot()` or in the name of a figure, and put
what it gives into the page. So a picture is always that of the code above it. The figures of a page
share one copy of plotly.js, which is a file of the site: nothing is fetched when a page is read.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_PLOTLY = "assets/javascripts/plotly.min.js"
# Python, and what it prints: the picture comes after both.
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n.*?^```\n)?", re.M | re.S)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds plotly.js to the files of the site."""
    import plotly
    from mkdocs.structure.files import File

    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    files.append(File.generated(config, _PLOTLY, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Runs a page, keeps its figures, and marks where each of them goes."""
    shown = [*pictures(markdown, page.file.src_uri)]
    page.meta["pictures"] = [figure for _, figure in shown]
    for number, (end, _) in reversed([*enumerate(shown)]):
        markdown = f"{markdown[:end]}\n{_mark(number)}\n{markdown[end:]}"
    return markdown


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Puts the figures of a page where they were marked, and plotly.js before the first."""
    # Not earlier: neither Markdown nor the index of the search should see them.
    for number, figure in enumerate(page.meta["pictures"]):
        html = figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{number}",
            config={"displayModeBar": False, "responsive": False},
        )
        if number == 0:
            path = page.file.dest_uri.count("/") * "../" + _PLOTLY
            html = f'<script charset="utf-8" src="{path}"></script>{html}'
        before, after = output.split(_mark(number))
        output = f'{before}<div style="overflow-x: auto; margin: 1em 0">{html}</div>{after}'
    return output


def pictures(markdown: str, name: str) -> Iterator[tuple[int, Any]]:
    """Runs the blocks of a page and gives each figure in which one ends, and where it goes.

    Args:
        markdown: the page.
        name: what the page is called in errors.

    Raises:
        TypeError: if a block ends in what would be shown, and it is no figure.
    """
    blocks = [*_BLOCK.finditer(markdown)]
    last = max((n for n, block in enumerate(blocks) if _shown(block[1])), default=-1)
    namespace: dict[str, object] = {}
    for block in blocks[: last + 1]:
        code = ast.parse(block[1], name)
        ast.increment_lineno(code, markdown.count("\n", 0, block.start(1)))
        expression = code.body.pop() if _shown(block[1]) else None
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, name, "exec"), namespace)
            if not isinstance(expression, ast.Expr):
                continue
            figure = eval(compile(ast.Expression(expression.value), name, "eval"), namespace)
        if not hasattr(figure, "to_html"):
            raise TypeError(f"{name}, line {expression.lineno}: {figure!r} is no figure.")
        yield block.end(), figure


def _shown(code: str) -> bool:
    """Whether a block ends in a figure: in a name, or in a call of `plot`."""
    match ast.parse(code).body[-1:]:
        case [ast.Expr(ast.Name() | ast.Call(ast.Attribute(attr="plot")))]:
            return True
    return False


def _mark(number: int) -> str:
    return f'<div id="picture-{number}"></div>'
