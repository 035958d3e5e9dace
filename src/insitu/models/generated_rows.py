"""Rows of token ids that were generated in one batch or one by one, each made of the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def rows_apart(
    sequences: torch.Tensor, sizes: Sequence[tuple[int, int]], ends: Iterable[int]
) -> list[torch.Tensor]:
    """Returns each prompt's rows of a batch, without the padding of its neighbours.

    Args:
        sequences: what was generated, `(rows, position)`, padded on the left.
        sizes: each prompt's rows, and how many tokens of them were not generated.
        ends: the ids that end a generation.
    """
    length = max(own for _, own in sizes)
    ending = torch.tensor(list(ends), device=sequences.device)
    each: list[torch.Tensor] = []
    first = 0
    for rows, own in sizes:
        mine = sequences[first : first + rows, length - own :]
        ended = torch.isin(mine[:, own:], ending)
        # Alone, it would have stopped when the last of its rows had ended.
        steps = torch.where(ended.any(1), ended.int().argmax(1) + 1, ended.shape[1])
        each.append(mine[:, : own + int(steps.max())])
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
