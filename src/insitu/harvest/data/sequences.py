"""Sequences: what the model is given, cut from documents or packed of several.

Where they are cut follows from the data and from the options alone. So it can begin at any place
between two sequences and goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from insitu.graph.errors import LimitError, LoadError
from insitu.graph.location import here
from insitu.harvest.data.tokenising import Tokenised
from insitu.harvest.layout import Place, Skipped

_ENOUGH = 1_000  # documents that say what share of them is unusable


class Sequence(NamedTuple):
    """Token ids that the model is given together.

    Attributes:
        ids: the token ids.
        parts: from which documents they come, in their order: a document and how many tokens.
        stop: where its part of the data ends.
    """

    ids: list[int]
    parts: list[tuple[int, int]]
    stop: Place


@dataclass(frozen=True, slots=True)
class Cutting:
    """How sequences are cut.

    Attributes:
        context: how many tokens a sequence has at most.
        pack: whether documents are put one behind the other.
        bos: the token that each sequence begins with; None for none. One that begins with it
            already gets no second one.
        separator: the token behind each packed document; None for none.
    """

    context: int
    pack: bool
    bos: int | None
    separator: int | None


def sequences(
    documents: Iterator[Tokenised | Skipped], cutting: Cutting, start: Place
) -> Iterator[Sequence | Skipped]:
    """Yields sequences in the order of the data, and skipped documents where they stand.

    Args:
        documents: the documents from that of the place on.
        cutting: how they are cut.
        start: where the first of them begins.

    Raises:
        LoadError: if there is no such place in the data.
    """
    cut = _packed if cutting.pack else _apart
    return cut(_behind(documents, start), cutting, start)


def _behind(
    documents: Iterator[Tokenised | Skipped], start: Place
) -> Iterator[Tokenised | Skipped]:
    """The documents, without what there is of the first before a place."""
    for one in documents:
        begun = start.token > 0 and one.document == start.document
        if begun and (isinstance(one, Skipped) or len(one.ids) < start.token):
            raise changed(start.document)
        yield one


def _apart(
    documents: Iterator[Tokenised | Skipped], cutting: Cutting, start: Place
) -> Iterator[Sequence | Skipped]:
    for one in documents:
        if isinstance(one, Skipped):
            yield one
            continue
        number, count = one.document, len(one.ids)
        at = start.token if number == start.document else 0
        while at < count:
            first = _first(cutting, one.ids[at])
            end = at + cutting.context - len(first)
            ids = [*first, *one.ids[at:end]]
            stop = Place(number, end) if end < count else Place(number + 1)
            yield Sequence(ids, [(number, len(ids))], stop)
            at = end


def _first(cutting: Cutting, token: int) -> list[int]:
    """The token before a sequence; none where it begins with it, as ids of tokenizers often do."""
    return [] if cutting.bos in (None, token) else [cutting.bos]


def _packed(
    documents: Iterator[Tokenised | Skipped], cutting: Cutting, start: Place
) -> Iterator[Sequence | Skipped]:
    tail = [] if cutting.separator is None else [cutting.separator]
    ids, parts = list[int](), list[tuple[int, int]]()
    stop = start
    for one in documents:
        if isinstance(one, Skipped):
            yield one
            continue
        number = one.document
        all_ids = [*one.ids, *tail]
        at = start.token if number == start.document else 0
        while at < len(all_ids):
            ids = ids or _first(cutting, all_ids[at])
            taken = min(cutting.context - len(ids), len(all_ids) - at)
            # The first token of a sequence is counted to the document that follows it.
            parts.append((number, taken + (0 if parts else len(ids))))
            ids += all_ids[at : at + taken]
            at += taken
            stop = Place(number, at) if at < len(all_ids) else Place(number + 1)
            if len(ids) == cutting.context:
                yield Sequence(ids, parts, stop)
                ids, parts = [], []
    if parts:
        yield Sequence(ids, parts, stop)


def check_skipped(skipped: int, place: Place, most: float, last: str, ended: bool) -> None:
    """Raises if too many documents were skipped.

    Args:
        skipped: how many were.
        place: how far the data was read.
        most: which share of the documents may be skipped.
        last: why the last of them was.
        ended: whether nothing comes behind the place.

    Raises:
        LimitError: after 1,000 documents, or at the end.
    """
    documents = place.document + bool(place.token)
    if (documents < _ENOUGH and not ended) or skipped <= most * documents:
        return
    raise LimitError(
        f"{skipped} of {documents} rows of the data cannot be used, the last of them because "
        f"{last}. That is more than `max_skipped={most:g}` of them. Shards that are written "
        "stay, and with a larger `max_skipped` the same call goes on.",
        here(),
        limit="max_skipped",
        found=skipped / max(documents, 1),
        allowed=most,
    )


def changed(document: int) -> LoadError:
    """Returns the error that says that the data is no longer what it was.

    Args:
        document: a row from which on it differs.
    """
    return LoadError(
        f"The data has changed since this folder was begun: at or behind row {document} it is "
        "not the same. Give the data as it was, or another folder.",
        here(),
    )
