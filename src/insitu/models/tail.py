"""What a prompt has in a forward that it enters behind a block: its part of what passes a site.

It is the counterpart of `batching.py`, for batches from which blocks and positions are left out;
what runs them is in `resume.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from insitu.batching.layout import Layouts, Part, cut, put, spread, widened
from insitu.graph.node import Place, Site
from insitu.graph.structure import clone, map_structure
from insitu.models.resume import Entering, Resumed
from insitu.models.unembedding import Unembedded, take_logits


class Tail(NamedTuple):
    """One prompt's share of a forward that it enters behind a block.

    Attributes:
        layouts: how the values at sites are cut.
        rows: its rows of the batch.
        forward: the forward.
        entering: where it enters.
        entry: where what the last block returned that it leaves out stands: at that block's
            output, and at the input of the next.
        unembedded: which positions of the batch become logits.
        logits: which of its own, counted from the first that is computed.
    """

    layouts: Layouts
    rows: slice
    forward: Resumed
    entering: Entering
    entry: frozenset[Place]
    unembedded: Unembedded
    logits: Sequence[int]

    def take(self, site: Site, value: Any) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        layout = self.layouts[site[1:4]]
        if site[1:4] in self.unembedded.places:
            logits = partial(self._unembedded, site)
            return take_logits(value, layout, logits, partial(self._own, site))
        return self._own(site, value, layout)

    def _unembedded(self, site: Site, value: Any, layout: Any) -> Any:
        """Its part of what has the positions only that become logits."""
        kept = slice(0, len(self.logits))
        part = Part(self.rows, kept, self.forward.rows, self.unembedded.count)
        own = cut(site, value, layout, part)
        start = self.forward.start
        return spread(own, layout, [start + at for at in self.logits], self.forward.length)

    def _own(self, site: Site, value: Any, layout: Any) -> Any:
        """Its part of what has all positions that are computed."""
        start = self.forward.start
        own = cut(site, value, layout, self._part(self.forward.length - start))
        if not start:
            return own
        own = spread(own, layout, slice(start, self.forward.length), self.forward.length)
        if site[1:4] in self.entry:
            row = self.entering
            own = map_structure(clone, own)
            hidden = own if isinstance(own, torch.Tensor) else own[0]
            hidden[:, :start] = row.prefix.hidden[row.level][row.origin, :start]
        return own

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        layout, start = self.layouts[site[1:4]], self.forward.start
        length = self.forward.length - start
        if start:
            whole = Part(
                slice(0, self.entering.rows),
                slice(start, self.forward.length),
                0,
                self.forward.length,
            )
            own = cut(site, own, layout, whole._replace(batch=self.entering.rows))
        put(site, value, layout, self._part(length), own)

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to."""
        return widened(value, self.layouts[site[1:4]], self.forward.rows)

    def _part(self, length: int) -> Part:
        return Part(self.rows, slice(0, length), self.forward.rows, length)
