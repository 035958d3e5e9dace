"""Documents: the rows of the data, one after the other, from any row on.

What `data` may be is told apart in `data.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import torch

from insitu.harvest.specification import DataSpecification


class Unusable(NamedTuple):
    """A row that is no document.

    Attributes:
        reason: why not.
    """

    reason: str


Document = str | Sequence[int] | Unusable
"""A text, token ids, or a row that is neither."""


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of some data.

    Attributes:
        specification: what the data is.
        read: gives the documents from a row on. It may be called again, unless `once`.
        jumps: whether that is quick for any row. If not, all rows before it are read again.
        count: how many there are; None if that is not known.
        once: whether they can be read only once, as of a generator.
    """

    specification: DataSpecification
    read: Callable[[int], Iterator[Document]]
    jumps: bool
    count: int | None = None
    once: bool = False


def unpadded_document(item: Any, mask: Any) -> Document:
    """Returns what stands in a row as a document, without its padding.

    Args:
        item: anything.
        mask: 0 where token ids are padding; None if there is none.
    """
    ids, kept = document_of(item), None if mask is None else document_of(mask)
    if kept is None or isinstance(ids, str | Unusable):
        return ids
    if isinstance(kept, str | Unusable) or len(kept) != len(ids):
        return Unusable("its attention mask is none of its token ids")
    return [one for one, there in zip(ids, kept, strict=True) if there]


def document_of(item: Any) -> Document:
    """Returns what stands in a row as a document.

    Args:
        item: anything.
    """
    if isinstance(item, str):
        return item
    if isinstance(item, torch.Tensor) or hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, list | tuple):
        if all(type(one) is int for one in item):
            return item
        if all(isinstance(one, Integral) and not isinstance(one, bool) for one in item):
            return [int(one) for one in item]  # numbers of NumPy's
        return Unusable("its items are no token ids")
    return Unusable("it is missing" if item is None else f"it is a {type(item).__name__}")
