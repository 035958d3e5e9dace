"""Whether a value of a batch, cut into parts, gives each prompt what it has alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from insitu.batching.layout import Entries, Part, TensorLayout, cut, flat_axis
from insitu.graph.errors import InsituError
from insitu.graph.node import Place, Site
from insitu.graph.structure import map_structure
from insitu.models.trial import alike


def copied_away(value: Any) -> Any:
    """Returns a copy of a value where there is room for what passes all places."""
    return map_structure(_put_by, value)


def _put_by(leaf: Any) -> Any:
    return leaf.to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else leaf


def agrees(place: Place, together: Any, alone: Any, layout: Any, part: Part) -> bool:
    """Returns whether a prompt's part of a batch's value is what it is alone.

    Args:
        place: where it passes.
        together: the batch's value.
        alone: what the prompt has there alone.
        layout: how it is cut. Of a mapping some entries may be left out.
        part: where the prompt lies in the batch.
    """
    if isinstance(layout, Entries):
        alone = {name: alone.get(name) for name in layout}
        together = {name: together.get(name) for name in layout}
    try:
        return alike(cut(Site(0, *place), together, layout, part), alone)
    except InsituError:  # it has another shape or structure
        return False


def tells_apart(value: Any, layout: Any) -> bool:
    """Returns whether a value would show if rows and positions did not lie in their order.

    Where each has an axis of its own they do.
    """
    if isinstance(layout, TensorLayout):
        flat = flat_axis(layout)
        if flat is None or not isinstance(value, torch.Tensor):
            return True
        tokens = value.movedim(flat, 0)
        return not bool((tokens == tokens[:1]).all())
    if isinstance(layout, tuple) and isinstance(value, tuple):
        return all(map(tells_apart, value, layout))
    if isinstance(layout, dict) and isinstance(value, Mapping):
        return all(tells_apart(value.get(name), inner) for name, inner in layout.items())
    return True
