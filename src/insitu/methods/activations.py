"""Activations of prompts: what methods that learn from them are given, gathered in one trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch

from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.prompts import Prompts
from insitu.methods.sites import Site, check_positions, numbers_of, site_of, whole
from insitu.models.language_model import LanguageModel

Positions: TypeAlias = int | Iterable[int] | Literal["mean"] | None
"""Where a value is taken: at one position, from the end if negative; at several, each by itself; as
the mean over all; or at all, each by itself, if None."""


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
    positions: Positions,
    max_tokens_per_pass: int | None = None,
) -> torch.Tensor:
    """Returns the activations of prompts at a site, in one trace.

    Arguments, errors and the result are those of `gather_each`, for one site.
    """
    return gather_each(model, prompts, [site], layers, positions, max_tokens_per_pass)[0]


def gather_each(
    model: LanguageModel,
    prompts: Prompts,
    sites: Sequence[Site],
    layers: Sequence[int],
    positions: Positions,
    max_tokens_per_pass: int | None = None,
) -> list[torch.Tensor]:
    """Returns the activations of prompts at each of some sites, in one trace.

    Args:
        model: the model.
        prompts: the prompts.
        sites: where, as of `stream_site`.
        layers: in which blocks.
        positions: at which positions.
        max_tokens_per_pass: as of `model.trace`.

    Returns:
        Of each site `(prompt, layer, width)`, or `(prompt, layer, position, width)` for several
        positions; on the CPU, float32.

    Raises:
        PromptError: if a prompt has no such position, or all are asked for of prompts of different
            length.
        OptionError: if the position is of no known kind.
    """
    taken_at = _index(prompts, positions)
    if taken_at not in (-1, None):  # the last one and the mean are something of any values
        check_positions(model)
    with model.trace(max_tokens_per_pass=max_tokens_per_pass) as tracer:
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


def positions_of(given: Any) -> int | tuple[int, ...] | Literal["mean"] | None:
    """Returns positions as they were meant, also of numbers of NumPy or torch.

    Args:
        given: a number, several, "mean", or None for all.

    Raises:
        OptionError: if it is none of these.
    """
    if given is None or (isinstance(given, str) and given == "mean"):
        return given
    if isinstance(given, str):
        raise OptionError(
            f'`positions` are a number, several numbers, "mean", or None for all, not {given!r}.',
            here(),
        )
    try:
        return whole(given)
    except TypeError:
        return tuple(numbers_of("position", given) or ())


def position_labels(prompts: Prompts, positions: Positions) -> tuple[str, ...] | None:
    """Returns the labels of several positions, None for one position or the mean.

    Args:
        prompts: the prompts.
        positions: as of `gather`.
    """
    if isinstance(positions, int | str):
        return None
    if positions is not None:
        return tuple(map(str, positions))
    if len(set(prompts.tokens)) == 1:
        return prompts.tokens[0]
    return tuple(map(str, range(prompts.lengths[0])))


def _index(prompts: Prompts, given: Positions) -> int | list[int] | slice | None:
    """What indexes the positions of a prompt, None for the mean over them."""
    positions, shortest = positions_of(given), min(prompts.lengths)
    if isinstance(positions, str):
        return None
    if positions is None:
        if len(set(prompts.lengths)) > 1:
            raise PromptError(
                "With `positions=None` prompts need the same number of tokens, and these have "
                f"{shortest} to {max(prompts.lengths)}: name positions that mean the same in "
                "each, such as `positions=[-2, -1]`.",
                here(),
            )
        return slice(None)
    numbers = [positions] if isinstance(positions, int) else list(positions)
    for number in numbers:
        if not -shortest <= number < shortest:
            raise PromptError(
                f"There is no position {number} in the shortest prompt, of {shortest} tokens.",
                here(),
            )
    return positions if isinstance(positions, int) else numbers
