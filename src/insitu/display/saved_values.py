"""Saved values of a job as a table for a terminal: what each is, not its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import RenderableType


class SavedValue(NamedTuple):
    """The facts of a saved value.

    Attributes:
        name: its name.
        saved_of: the expression that it was saved of.
        shape: its sizes, in the structure of the value; "?" if they are not known.
        dtype: its dtypes, in the same structure.
        bytes: how many it takes, None if that is not known.
        note: what else there is to say, "" if nothing.
    """

    name: str
    saved_of: str
    shape: str
    dtype: str
    bytes: int | None
    note: str = ""


def saved_table(values: Sequence[SavedValue], below: Sequence[str] = ()) -> RenderableType:
    """Returns a table of saved values.

    Args:
        values: the values.
        below: lines that come after it.
    """
    from rich.console import Group  # of use to terminals only
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "saved of", "shape", "dtype"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes", justify="right")
    notes = any(value.note for value in values)
    if notes:
        table.add_column("note", overflow="fold")
    for value in values:
        size = "?" if value.bytes is None else f"{value.bytes:,}"
        cells = [value.name, value.saved_of, value.shape, value.dtype, size]
        table.add_row(*map(Text, cells + [value.note] * notes))
    return Group(table, *map(Text, below))
