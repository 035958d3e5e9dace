"""Activations of prompts: what methods that learn from them are given, gathered in one trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch

from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.prompts import Prompts
from insitu.methods.sites import Site, check_positions, numbers_of, site_of, whole
from insitu.models.language_model import LanguageModel

Position: TypeAlias = int | Sequence[int] | Literal["mean", "all"]
"""Where a value is taken: at one position, from the end if negative; at several, each by itself; as
the mean over all; or at all, each by itself."""


def stream_site(name: str) -> Site:
    """Returns the site of a standard name whose value is a vector at each position.

    Args:
        name: such as "residual_out", "mlp_out" or "post".

    Raises:
        OptionError: if there is none of that name, or it has other axes.
    """
    site = site_of(name)
    if len(site.axes) != 2 or site.axes[0] != "position":
        raise OptionError(
            f"A value of {name!r} has the axes {', '.join(site.axes)}, and one with a vector at "
            'each position is needed, such as "residual_out".',
            here(),
        )
    return site


def gather(
    model: LanguageModel,
    prompts: Prompts,
    site: Site,
    layers: Sequence[int],
    position: Position,
) -> torch.Tensor:
    """Returns the activations of prompts at a site, in one trace.

    Arguments, errors and the result are those of `gather_each`, for one site.
    """
    return gather_each(model, prompts, [site], layers, position)[0]


def gather_each(
    model: LanguageModel,
    prompts: Prompts,
    sites: Sequence[Site],
    layers: Sequence[int],
    position: Position,
) -> list[torch.Tensor]:
    """Returns the activations of prompts at each of some sites, in one trace.

    Args:
        model: the model.
        prompts: the prompts.
        sites: where, as of `stream_site`.
        layers: in which blocks.
        position: at which positions.

    Returns:
        Of each site `(prompt, layer, width)`, or `(prompt, layer, position, width)` for several
        positions; on the CPU, float32.

    Raises:
        PromptError: if a prompt has no such position, or all are asked for of prompts of different
            length.
        OptionError: if the position is of no known kind.
    """
    taken_at = _index(prompts, position)
    if taken_at not in (-1, None):  # the last one and the mean are something of any values
        check_positions(model)
    with model.trace() as tracer:
        saved: list[list[list[Any]]] = [[] for _ in sites]
        for ids in prompts.ids:
            with tracer.invoke(ids):
                for site, kept in zip(sites, saved, strict=True):
                    values = [site.read(model, layer)[0] for layer in layers]
                    taken = [v.mean(0) if taken_at is None else v[taken_at] for v in values]
                    kept.append([value.save(to="cpu") for value in taken])
    return [
        torch.stack([torch.stack([value.value for value in own]) for own in of_site]).float()
        for of_site in saved
    ]


def position_of(given: Any) -> int | tuple[int, ...] | Literal["mean", "all"]:
    """Returns a position as it was meant, also of numbers of NumPy or torch.

    Args:
        given: a number, several, "mean" or "all".

    Raises:
        OptionError: if it is none of these.
    """
    if isinstance(given, str) and given in ("mean", "all"):
        return given
    said = f'A position is a number, several numbers, "mean" or "all", not {given!r}.'
    if given is None or isinstance(given, str):
        raise OptionError(said, here())
    try:
        return whole(given)
    except TypeError:
        return tuple(numbers_of("position", given) or ())


def positions_of(prompts: Prompts, position: Position) -> tuple[str, ...] | None:
    """Returns the labels of several positions, None for one position or the mean.

    Args:
        prompts: the prompts.
        position: as of `gather`.
    """
    if isinstance(position, int) or position == "mean":
        return None
    if position != "all":
        return tuple(map(str, position))
    if len(set(prompts.tokens)) == 1:
        return prompts.tokens[0]
    return tuple(map(str, range(prompts.lengths[0])))


def _index(prompts: Prompts, position: Position) -> int | list[int] | slice | None:
    """What indexes the positions of a prompt, None for the mean over them."""
    position, shortest = position_of(position), min(prompts.lengths)
    if isinstance(position, str):
        if position == "all":
            if len(set(prompts.lengths)) > 1:
                raise PromptError(
                    'At `position="all"` prompts need the same number of tokens, and these have '
                    f"{shortest} to {max(prompts.lengths)}: name positions that mean the same in "
                    "each, such as `position=[-2, -1]`.",
                    here(),
                )
            return slice(None)
        return None
    numbers = [position] if isinstance(position, int) else list(position)
    for number in numbers:
        if not -shortest <= number < shortest:
            raise PromptError(
                f"There is no position {number} in the shortest prompt, of {shortest} tokens.",
                here(),
            )
    return position if isinstance(position, int) else numbers
