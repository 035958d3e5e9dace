"""Several invocations in one batch: padded, masked, and where each of them lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.graph.node import Site
from insitu.models.prompts import Prompt, Side
from insitu.runtime.layout import Layouts, Part, cut, put
from insitu.runtime.passes import Cut


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


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One prompt's share of a batch.

    Attributes:
        layouts: how the values at sites are cut.
        part: where the prompt lies.
    """

    layouts: Layouts
    part: Part

    def take(self, site: Site, value: Any) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        return cut(site, value, self.layouts[site[1:4]], self.part)

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        put(site, value, self.layouts[site[1:4]], self.part, own)


def cuts(batch: Batch, layouts: Layouts) -> Mapping[int, Cut]:
    """Returns how each prompt finds its own part of what arrives at a site."""
    return {number: Share(layouts, part) for number, part in enumerate(batch.parts)}
