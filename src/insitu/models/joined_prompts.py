"""Several prompts in one batch: padded, masked, and where each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from insitu.batching.demand import Side
from insitu.batching.layout import Part
from insitu.models.prompts import Prompt


class Batch(NamedTuple):
    """Prompts as one batch.

    Attributes:
        ids: token ids `(rows, position)`.
        mask: 1 for tokens and 0 for padding, or None if there is no padding.
        parts: where each prompt lies.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    parts: Sequence[Part]


def join(prompts: Sequence[Prompt], side: Side, pad_id: int) -> Batch:
    """Returns prompts as one batch.

    Args:
        prompts: at least one.
        side: where shorter ones are padded.
        pad_id: what the padding is filled with.
    """
    first = prompts[0].ids
    length, device = first.shape[1], first.device
    if all(p.ids.shape[1] == length and p.mask is None for p in prompts):
        ids = torch.cat([prompt.ids.to(device) for prompt in prompts])
        return Batch(ids, None, _parts(prompts, "right", ids.shape[0], length))
    batch = sum(prompt.ids.shape[0] for prompt in prompts)
    length = max(prompt.ids.shape[1] for prompt in prompts)
    parts = _parts(prompts, side, batch, length)
    ids = torch.full((batch, length), pad_id, device=device)
    mask = torch.zeros_like(ids)
    for prompt, part in zip(prompts, parts, strict=True):
        ids[part.rows, part.positions] = prompt.ids.to(device)
        mask[part.rows, part.positions] = prompt.visible_mask.to(device)
    return Batch(ids, None if bool(mask.all()) else mask, parts)


def _parts(prompts: Sequence[Prompt], side: Side, batch: int, length: int) -> list[Part]:
    """Where prompts lie in a batch, one below the other."""
    parts: list[Part] = []
    first = 0
    for prompt in prompts:
        rows, own = prompt.ids.shape
        start = 0 if side == "right" else length - own
        last = first + rows
        parts.append(Part(slice(first, last), slice(start, start + own), batch, length))
        first = last
    return parts


def is_ragged(requests: Sequence[Prompt]) -> bool:
    """Returns whether a batch of some prompts is padded.

    Args:
        requests: the prompts.
    """
    return len({prompt.ids.shape[1] for prompt in requests}) > 1


def sides_of(requests: Sequence[Prompt]) -> list[Side]:
    """Returns where each prompt of a block is padded in a batch.

    Prompts with padding before them need position ids, and then all in their batch have some.
    Several rows without padding share theirs when they are alone, and so have a batch of others.

    Args:
        requests: the prompts.
    """
    if all(prompt.positions is None for prompt in requests):
        return ["right"] * len(requests)
    return [
        "right" if prompt.positions is None and prompt.ids.shape[0] > 1 else "left"
        for prompt in requests
    ]
