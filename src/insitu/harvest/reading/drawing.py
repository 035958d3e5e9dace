"""What a folder of activations holds, as a line and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from insitu.harvest.reading.opening import Contents, tensors_of_site

if TYPE_CHECKING:
    from rich.console import RenderableType

HEAD = ("site", "shape of a row", "dtype", "bytes")
"""The names of the columns of `site_rows`."""


def summary(contents: Contents) -> str:
    """Returns in a line what a folder holds."""
    told, lines = contents.specification, contents.lines
    rows, tokens = sum(line.rows for line in lines), sum(line.tokens for line in lines)
    skipped = sum(len(line.skipped) for line in lines)
    return (
        f"Activations of {_line(told.model)} on {_line(told.data.name)}: {rows:,} rows of "
        f"{tokens:,} tokens in {len(lines):,} shard{'s' * (len(lines) != 1)}"
        + (f", {skipped:,} rows of the data skipped" if skipped else "")
        + ("" if contents.complete else ", not at its end")
    )


def site_rows(contents: Contents) -> list[tuple[str, str, str, str]]:
    """Returns the label, shape, dtype and bytes of each site, as text."""
    rows = sum(line.rows for line in contents.lines)
    table: list[tuple[str, str, str, str]] = []
    for site in contents.specification.sites:
        shape = str(site.shape)
        if site.features is not None:
            shape = f"{site.shape[0]} of {site.features:,} features"
        tensors = tensors_of_site(site).values()
        size = sum(torch.Size(row).numel() * dtype.itemsize for dtype, row in tensors)
        table.append((_line(site.label), shape, site.dtype, f"{size * rows:,}"))
    return table


def site_table(contents: Contents) -> RenderableType:
    """Returns the sites as a table for a terminal, under a line that says what the folder is."""
    from rich.console import Group  # of use to terminals only
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in HEAD:
        table.add_column(name, overflow="fold", justify="right" if name == "bytes" else "left")
    for row in site_rows(contents):
        table.add_row(*map(Text, row))
    return Group(Text(summary(contents), style="bold"), table)


def _line(text: str) -> str:
    """A text without what would break a line or a terminal: a folder may come from anybody."""
    plain = (
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
    return "".join(plain)
