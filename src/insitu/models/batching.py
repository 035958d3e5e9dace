"""Several invocations in one batch: padded, masked, and where each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from insitu.batching.layout import Layouts, Part, cut, put, spread, widened
from insitu.graph.node import Site
from insitu.graph.structure import map_structure
from insitu.models.prompts import Prompt, Side
from insitu.models.unembedding import ALL_UNEMBEDDED, Unembedded, take_logits
from insitu.runtime.hooks import Cut


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


_NONE: Layouts = {}


class Share(NamedTuple):
    """One prompt's share of a batch.

    Attributes:
        layouts: how the values at sites are cut.
        part: where the prompt lies.
        unembedded: which positions of the batch become logits.
        logits: which of its own.
        later: how the values at sites are cut in the later steps of a generation.
    """

    layouts: Layouts
    part: Part
    unembedded: Unembedded = ALL_UNEMBEDDED
    logits: Sequence[int] = ()
    later: Layouts = _NONE

    def take(self, site: Site, value: Any) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        layout, part = self._in_step(site)
        if site[1:4] in self.unembedded.places:
            logits = partial(self._unembedded, site)
            return take_logits(value, layout, logits, partial(self._own, site))
        own = cut(site, value, layout, part)
        return own if part.spans_length else map_structure(_packed, own)

    def _own(self, site: Site, value: Any, layout: Any) -> Any:
        """The prompt's part of what has all positions, as it lies in memory alone."""
        return map_structure(_packed, cut(site, value, layout, self.part))

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to."""
        layout, part = self._in_step(site)
        return widened(value, layout, part.batch)

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        layout, part = self._in_step(site)
        put(site, value, layout, part, own)

    def _in_step(self, site: Site) -> tuple[Any, Part]:
        """How the value at a site is cut in its step, and where the prompt lies there."""
        if not site[4]:
            return self.layouts[site[1:4]], self.part
        return self.later[site[1:4]], self.part._replace(step=site[4])

    def _unembedded(self, site: Site, value: Any, layout: Any) -> Any:
        """The prompt's part of what has the positions only that become logits."""
        rows, positions, batch, *_ = self.part
        kept = Part(rows, slice(0, len(self.logits)), batch, self.unembedded.count)
        own = cut(site, value, layout, kept)
        return spread(own, layout, self.logits, positions.stop - positions.start)


def _packed(leaf: Any) -> Any:
    """A tensor without gaps in its memory: what is cut out of padding has some."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_contiguous():
        return leaf
    return leaf.clone()  # of the same order of strides


def cuts(
    batch: Batch,
    layouts: Layouts,
    unembedded: Unembedded = ALL_UNEMBEDDED,
    later: Layouts = _NONE,
) -> Sequence[Cut]:
    """Returns how each prompt finds its own part of what arrives at a site."""
    if unembedded.index is None:
        return [Share(layouts, part, later=later) for part in batch.parts]
    parts = zip(batch.parts, unembedded.positions, strict=True)
    return [Share(layouts, part, unembedded, logits) for part, logits in parts]
