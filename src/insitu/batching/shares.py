"""One invocation's share of a pass: how its own part of what passes a site is found there.

In a pass that its rows enter behind a block, blocks and positions are left out: what it is given
has all positions, and those that were not computed hold nothing in particular.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch

from insitu.batching.layout import Layouts, Part, cut, put, spread, widened
from insitu.batching.pass_plan import Logits
from insitu.graph.node import Place, Site
from insitu.graph.structure import clone, map_structure

_NONE: Layouts = {}


class Offset(NamedTuple):
    """Where a prompt's rows begin in a pass that they enter behind a block.

    Attributes:
        start: how many positions are left out.
        length: how many positions the prompt has, with these.
        batch: gives how many rows the batch has now: others enter behind later blocks.
        entry: where what the last block returned that is left out stands: at that block's output,
            and at the input of the next.
        before: gives what stands there at the positions that are left out,
            `(rows, position, d_model)`.
    """

    start: int
    length: int
    batch: Callable[[], int]
    entry: frozenset[Place]
    before: Callable[[], torch.Tensor]


class Share(NamedTuple):
    """One prompt's share of a pass.

    Attributes:
        layouts: how the values at sites are cut.
        part: where the prompt lies in the batch, of the positions that are computed.
        logits: which positions of the pass become logits; None for all.
        own_logits: which of its own positions, counted from the first that is computed.
        later: how the values at sites are cut in the later steps of a generation.
        offset: where its rows begin; None for the model's beginning.
    """

    layouts: Layouts
    part: Part
    logits: Logits | None = None
    own_logits: Sequence[int] = ()
    later: Layouts = _NONE
    offset: Offset | None = None

    def take(self, site: Site, value: Any) -> Any:
        """Returns the prompt's own part of what arrived at a site."""
        layout, part = self._in_step(site)
        # Of these only the positions exist that somebody looks at.
        if self.logits is not None and site[1:4] in self.logits.places:
            own = partial(self._own, site, part)
            return _take_logits(value, layout, partial(self._unembedded, site, part), own)
        return self._own(site, part, value, layout)

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the prompt's own part of a copy of what arrived at a site."""
        layout, part = self._in_step(site)
        # The batch has only the positions from the start on, and the value to write has all.
        if self.offset is not None and self.offset.start:
            rows = part.rows.stop - part.rows.start
            computed = slice(self.offset.start, self.offset.length)
            own = cut(site, own, layout, Part(slice(0, rows), computed, rows, self.offset.length))
        put(site, value, layout, part, own)

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to."""
        layout, part = self._in_step(site)
        return widened(value, layout, part.batch)

    def _in_step(self, site: Site) -> tuple[Any, Part]:
        """How the value at a site is cut in its step, and where the prompt lies there."""
        # Later steps have layouts of their own: values there have one position, or a cache that has
        # grown.
        if site[4]:
            return self.later[site[1:4]], self.part._replace(step=site[4])
        if self.offset is not None:
            # Rows enter from block to block, so the batch is as large as it is at this moment.
            return self.layouts[site[1:4]], self.part._replace(batch=self.offset.batch())
        return self.layouts[site[1:4]], self.part

    def _own(self, site: Site, part: Part, value: Any, layout: Any) -> Any:
        """The prompt's part of what has all positions that are computed."""
        own = cut(site, value, layout, part)
        if not part.spans_length:
            return map_structure(_packed, own)
        return own if self.offset is None else self._spread(site, own, layout, self.offset)

    def _spread(self, site: Site, own: Any, layout: Any, offset: Offset) -> Any:
        """The prompt's part of a value, with the positions that are left out."""
        if not offset.start:
            return own
        own = spread(own, layout, slice(offset.start, offset.length), offset.length)
        if site[1:4] in offset.entry:
            own = map_structure(clone, own)
            hidden = own if isinstance(own, torch.Tensor) else own[0]
            # Where the rows enter, the positions before are known: the prompt's own run has left
            # them.
            hidden[:, : offset.start] = offset.before()
        return own

    def _unembedded(self, site: Site, part: Part, value: Any, layout: Any) -> Any:
        """The prompt's part of what has the positions only that become logits."""
        assert self.logits is not None
        kept = Part(part.rows, slice(0, len(self.own_logits)), part.batch, self.logits.most)
        own = cut(site, value, layout, kept)
        if self.offset is None:
            return spread(own, layout, self.own_logits, part.positions.stop - part.positions.start)
        positions = [self.offset.start + at for at in self.own_logits]
        return spread(own, layout, positions, self.offset.length)


def _take_logits(
    value: Any, layout: Any, logits: Callable[[Any, Any], Any], others: Callable[[Any, Any], Any]
) -> Any:
    """A prompt's part of a value in which not all positions have become logits.

    Args:
        value: the logits, or all that the model returns.
        layout: its layout.
        logits: gives the prompt's part of logits, with their layout.
        others: gives its part of other values.
    """
    if not isinstance(layout, dict) or not isinstance(value, dict):
        return logits(value, layout)
    entries, inner = cast("dict[str, Any]", value), cast("dict[str, Any]", layout)
    if entries.keys() != inner.keys():
        return logits(entries, inner)
    kind = cast(Any, type(entries))
    own = {name: logits if name == "logits" else others for name in inner}
    return kind({name: take(entries[name], inner[name]) for name, take in own.items()})


def _packed(leaf: Any) -> Any:
    """A tensor without gaps in its memory: a part that is cut out of padding has some."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_contiguous():
        return leaf
    return leaf.clone()  # of the same order of strides
