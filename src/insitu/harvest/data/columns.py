"""Which column of a table holds the documents, and which one says what of them is padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here

_USUAL = ("text", "input_ids", "tokens")


def chosen_column(given: str | None, there: Sequence[str], where: str) -> str:
    """Returns the column with texts or token ids.

    Args:
        given: the column that was asked for; None for the usual one.
        there: the columns of the table.
        where: what the table is called.

    Raises:
        OptionError: if there is no such column, or none that is usual among several.
    """
    if given is not None:
        if given not in there:
            close = nearest(given, there)
            raise OptionError(
                f"{where!r} has no column {given!r}{close}, but {', '.join(there)}.", here()
            )
        return given
    usual = [one for one in _USUAL if one in there] or (list(there) if len(there) == 1 else [])
    if not usual:
        raise OptionError(
            f"{where!r} has the columns {', '.join(there)}: say which holds the texts or token "
            "ids, such as `column='text'`.",
            here(),
        )
    return usual[0]


def mask_of_padding(column: str | None, there: Iterable[str]) -> str | None:
    """Returns the column that is 0 where token ids are padding, as tokenizers call it.

    Args:
        column: the column with texts or token ids.
        there: the columns of the table.
    """
    return "attention_mask" if column == "input_ids" and "attention_mask" in there else None
