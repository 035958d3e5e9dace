"""Rows of text as a table in HTML, for notebooks: of a plan, or of what a model wrote."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape


def rows_html(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[str] = (),
    below: str = "",
) -> str:
    """Returns rows of text as a table.

    Args:
        head: the names of the columns.
        rows: the cells of each row.
        left: the columns whose text begins at the left; others hold numbers.
        below: a line under the table, "" for none.
    """
    styles = [
        "text-align: left; white-space: pre-wrap" if name in left else "text-align: right"
        for name in head
    ]
    parts = ["<table><thead><tr>"]
    parts += _cells("th", head, styles)
    parts.append("</tr></thead><tbody>")
    for row in rows:
        parts += ["<tr>", *_cells("td", row, styles), "</tr>"]
    parts.append("</tbody></table>")
    if below:
        parts.append(f"<p>{escape(below)}</p>")
    return "".join(parts)


def _cells(tag: str, texts: Sequence[str], styles: Sequence[str]) -> list[str]:
    return [
        f'<{tag} style="{style}">{escape(text)}</{tag}>'
        for text, style in zip(texts, styles, strict=True)
    ]
