"""Several invocations in one batch: padded, masked, and where each of them lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.graph.node import Site
from insitu.graph.structure import map_structure
from insitu.models.prompts import Prompt, Side
from insitu.runtime.hooks import Cut
from insitu.runtime.layout import Layouts, Part, cut, put


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts as one batch.

    Attributes:
        ids: token ids `(rows, position)`.
        mask: 1 for tokens and 0 for padding, or None if there is no padding.
        parts: where each prompt lies.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    parts: tuple[Part, ...]


def join(prompts: Sequence[Prompt], side: Side, pad_id: int) -> Batch:
    """Returns prompts as one batch.

    Args:
        prompts: at least one.
        side: where shorter ones are padded.
        pad_id: what the padding is filled with.
    """
    batch = sum(prompt.ids.shape[0] for prompt in prompts)
    length = max(prompt.ids.shape[1] for prompt in prompts)
    ids = torch.full((batch, length), pad_id, device=prompts[0].ids.device)
    mask = torch.zeros_like(ids)
    parts: list[Part] = []
    first = 0
    for prompt in prompts:
        rows, own = prompt.ids.shape
        start = 0 if side == "right" else length - own
        part = Part(slice(first, first + rows), slice(start, start + own), batch, length)
        ids[part.rows, part.positions] = prompt.ids.to(ids.device)
        mask[part.rows, part.positions] = prompt.visible_mask.to(ids.device)
        parts.append(part)
        first += rows
    return Batch(ids, None if bool(mask.all()) else mask, tuple(parts))


def lie_apart(prompts: Sequence[Prompt]) -> bool:
    """Returns whether the rows of some prompt would have padding between them in a batch.

    What is written into such a prompt's part in place would not show in a copy without gaps, and
    with them it is not the tensor that it would be alone.
    """
    ragged = len({prompt.ids.shape[1] for prompt in prompts}) > 1
    return ragged and any(prompt.ids.shape[0] > 1 for prompt in prompts)


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One prompt's share of a batch.

    Attributes:
        layouts: how the values at sites are cut.
        part: where the prompt lies.
    """

    layouts: Layouts
    part: Part

    def take(self, site: Site, value: Any, writable: bool = False) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        own = cut(site, value, self.layouts[site[1:4]], self.part)
        return own if writable or self.part.spans_length else map_structure(_packed, own)

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        put(site, value, self.layouts[site[1:4]], self.part, own)


def _packed(leaf: Any) -> Any:
    """A tensor without gaps in its memory: what is cut out of padding has some."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_contiguous():
        return leaf
    return leaf.clone()  # of the same order of strides


def cuts(batch: Batch, layouts: Layouts) -> Mapping[int, Cut]:
    """Returns how each prompt finds its own part of what arrives at a site."""
    return {number: Share(layouts, part) for number, part in enumerate(batch.parts)}
