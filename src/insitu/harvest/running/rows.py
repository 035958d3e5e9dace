"""The rows of a range: which tokens they are of, and where they lie in its shard."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from insitu.harvest.data.ranges import Range
from insitu.harvest.data.sequences import Sequence
from insitu.harvest.layout import DOCUMENT, POSITION, SEQUENCE, TOKEN_IDS
from insitu.harvest.running.batch import positions_in
from insitu.harvest.specification import Reduction


class Rows(NamedTuple):
    """The rows of a range.

    Attributes:
        tensors: what each row is of, by the names of a shard.
        starts: where the rows of each sequence begin.
        count: how many there are.
    """

    tensors: dict[str, torch.Tensor]
    starts: list[int]
    count: int


def rows_of(one: Range, reduce: Reduction) -> Rows:
    """Returns the rows of a range.

    Args:
        one: the range.
        reduce: which rows of a sequence are kept.
    """
    taken = [_positions(reduce, len(each.ids)) for each in one.sequences]
    counts = [1 if own is None else len(own) for own in taken]
    count = sum(counts)
    numbers = torch.arange(one.first_sequence, one.first_sequence + len(counts))
    tokens = torch.empty(count, dtype=torch.int32)
    positions = torch.empty(count, dtype=torch.int32)
    documents = torch.empty(count, dtype=torch.int64)
    starts = [0, *accumulate(counts)]
    for each, own, start, size in zip(one.sequences, taken, starts, counts, strict=False):
        place = slice(start, start + size)
        if own is None:  # made of all positions
            tokens[place] = positions[place] = -1
            documents[place] = each.parts[0][0]
            continue
        ids, of = torch.tensor(each.ids), _documents(each)
        index = (
            None
            if len(own) == len(each.ids) and reduce is None
            else torch.tensor([*own], dtype=torch.long)
        )
        tokens[place] = (ids if index is None else ids[index]).to(torch.int32)
        positions[place] = torch.arange(size) if index is None else index
        documents[place] = of if index is None else of[index]
    tensors = {
        TOKEN_IDS: tokens,
        SEQUENCE: numbers.repeat_interleave(torch.tensor(counts)),
        POSITION: positions,
        DOCUMENT: documents,
    }
    return Rows(tensors, starts[:-1], count)


def _positions(reduce: Reduction, length: int) -> range | list[int] | None:
    """The positions of a sequence that are kept, None if they are made one."""
    if reduce is None:
        return range(length)
    if reduce == "mean":
        return None
    if reduce == "last":
        return [length - 1]
    assert not isinstance(reduce, str)
    return positions_in(reduce, length)


def _documents(one: Sequence) -> torch.Tensor:
    """The document of each token."""
    if len(one.parts) == 1:
        document, count = one.parts[0]
        return torch.full((count,), document)
    documents, counts = zip(*one.parts, strict=True)
    return torch.tensor(documents).repeat_interleave(torch.tensor(counts))
