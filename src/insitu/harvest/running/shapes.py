"""Shapes and dtypes of the sites of a harvest, from a forward without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from insitu.graph.errors import NoValueError, OptionError, UnknownShapeError
from insitu.graph.location import here
from insitu.harvest.running.sites import HarvestSite
from insitu.models.language_model import LanguageModel
from insitu.tracing.tracer import Tracer

_ROWS, _POSITIONS = (2, 3), (5, 7)


def shapes_of(
    model: LanguageModel, sites: Sequence[HarvestSite]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Returns the shape of one row and the dtype of values of each site, by label.

    Args:
        model: the model.
        sites: the sites.

    Raises:
        OptionError: if values of a site are not `(rows, position, ...)`.
    """
    # Two sizes tell which axes are those of rows and positions: no other number moves with them.
    most = model.traits.reader.limits.context or _POSITIONS[1]
    shorter, longer = min(_POSITIONS[0], max(most - 1, 1)), min(_POSITIONS[1], most)
    sizes = [*zip(_ROWS, (shorter, longer), strict=True)]
    try:
        seen = [_seen(model.scan, model, sites, *size) for size in sizes]
    except (NoValueError, UnknownShapeError):
        # Where a forward depends on what it computes, such as which experts it calls, it is run.
        seen = [_seen(model.trace, model, sites, *size) for size in sizes]
    found = dict[str, tuple[tuple[int, ...], torch.dtype]]()
    for site in sites:
        one, other = (values[site.label] for values in seen)
        if not isinstance(one, torch.Tensor):
            parts = ", ".join(f"'{site.label}.{at}'" for at in range(min(len(one), 3)))
            raise OptionError(f"{site.label!r} gives several values: name one, {parts}.", here())
        shape = tuple(one.shape[2:])
        moved = [one.shape[:2], other.shape[:2]] == sizes
        if not moved or tuple(other.shape[2:]) != shape:
            raise OptionError(
                f"A value of {site.label!r} has the shape {tuple(one.shape)} for {_ROWS[0]} "
                f"sequences of {shorter} tokens, which does not begin with these.",
                here(),
            )
        if site.sae is not None and shape != (site.sae.width,):
            raise OptionError(
                f"The autoencoder of {site.label!r} takes vectors of {site.sae.width} numbers, "
                f"and there they are of the shape {shape}.",
                here(),
            )
        found[site.label] = shape, one.dtype
    return found


def _seen(
    opened: Callable[[torch.Tensor], Tracer],
    model: LanguageModel,
    sites: Sequence[HarvestSite],
    rows: int,
    positions: int,
) -> dict[str, Any]:
    """Values of the sites, fake ones of a scan, for so many rows and positions."""
    saved = dict[str, Any]()
    with opened(torch.zeros(rows, positions, dtype=torch.long)):
        for site in sites:
            saved[site.label] = site.place.arranged(site.place.read(model)).save()
    return {label: value.value for label, value in saved.items()}
