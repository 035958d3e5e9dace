"""Rows of token ids that were generated in one batch or one by one, each made of the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rows_apart(
    sequences: torch.Tensor, sizes: Sequence[tuple[int, int, int]]
) -> list[torch.Tensor]:
    """Returns each prompt's rows of a batch, without the padding of its neighbours.

    Args:
        sequences: what was generated, `(rows, position)`, padded on the left.
        sizes: each prompt's rows, how many tokens of them were not generated, and how many were.
    """
    length = max(given for _, given, _ in sizes)
    each: list[torch.Tensor] = []
    first = 0
    for rows, given, steps in sizes:
        each.append(sequences[first : first + rows, length - given : length + steps])
        first += rows
    return each


def rows_together(each: Sequence[torch.Tensor], given: Sequence[int], pad_id: int) -> torch.Tensor:
    """Returns rows that were generated one by one as a batch would have padded them.

    Args:
        each: each prompt's rows, `(rows, position)`.
        given: how many tokens of them were not generated.
        pad_id: the id that fills padding.
    """
    before = max(given)
    pairs = list(zip(each, given, strict=True))
    after = max(own.shape[1] - length for own, length in pairs)
    rows: list[torch.Tensor] = []
    for own, length in pairs:
        left = before - length
        right = before + after - left - own.shape[1]
        rows.append(torch.nn.functional.pad(own, (left, right), value=pad_id))
    return torch.cat(rows)
