"""The replacement of a value that is ablated: zeros, a mean, or another prompt's value."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.prompts import Prompts
from insitu.methods.sites import Site
from insitu.models.language_model import LanguageModel

Method: TypeAlias = Literal["zero", "mean", "resample"]
"""The kind of value that is put there: see `insitu.methods.ablate`."""

Positions: TypeAlias = Sequence[list[int] | None]
"""Of each prompt, which positions are ablated; None for all."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """What to put in the place of a site's value, in an open trace.

    Attributes:
        site: the site.
        method: the value that is put there.
        by_position: whether means are of each position by itself.
        lengths: how many positions each reference prompt has.
        drawn: of each prompt, the number of the reference prompt whose values it gets; empty
            unless one is drawn.
        states: the values of reference prompts, by their number and the layer.
        means: the means that were asked for, by layer.
    """

    site: Site
    method: Method
    by_position: bool
    lengths: tuple[int, ...]
    drawn: tuple[int, ...] = ()
    states: dict[tuple[int, int], Any] = field(default_factory=dict)
    means: dict[int, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[int]:
        """The numbers of the reference prompts whose values are used."""
        if self.method == "zero":
            return []
        return sorted(set(self.drawn)) if self.drawn else list(range(len(self.lengths)))

    def read(
        self, model: LanguageModel, invocations: Mapping[int, Any], layers: Iterable[int]
    ) -> None:
        """Reads the values that are needed of the reference prompts.

        Args:
            model: the model.
            invocations: that of each of `sources`.
            layers: which layers' values are to be replaced.
        """
        for number in self.sources:
            with invocations[number]:
                for layer in layers:
                    self.states[number, layer] = self.site.read(model, layer)
        if self.method == "mean":
            for layer in layers:
                self.means[layer] = self._mean(layer)

    def value(self, prompt: int, layer: int, positions: Any, **chosen: Any) -> Any:
        """Returns what to put there, in a shape that goes with that of the part that is replaced.

        Args:
            prompt: the number of the prompt.
            layer: in which layer.
            positions: which positions are replaced, as an index.
            chosen: which parts, as of `Site.index`.
        """
        if self.method == "zero":
            return 0.0
        if self.method == "mean" and not self.by_position:
            return self.means[layer][self.site.index(**chosen)]
        source = self.means[layer] if self.method == "mean" else None
        if source is None:
            source = self.states[self.drawn[prompt], layer]
        return source[self.site.index(position=positions, **chosen)]

    def _mean(self, layer: int) -> Any:
        """The mean in a layer: of each position, or with one entry for all of them."""
        states = [self.states[number, layer] for number in self.sources]
        values = [value.float() for value in states]
        if self.by_position:
            mean = self._by_position(values)
        else:
            total: Any = sum(value.sum(-2, keepdim=True) for value in values)
            # They are counted, because a decoder behind an encoder has not those of the prompt.
            ones = (torch.ones_like(value[..., :1]) for value in values)
            mean = total / sum(one.sum(-2, keepdim=True) for one in ones)
        return mean.type_as(states[0])

    def _by_position(self, values: list[Any]) -> Any:
        longest = max(self.lengths)
        filled = [
            F.pad(value, (0, 0, 0, longest - length))
            for value, length in zip(values, self.lengths, strict=True)
        ]
        counts = [sum(length > position for length in self.lengths) for position in range(longest)]
        total: Any = sum(filled)
        return total / torch.tensor(counts)[:, None].to(total)


def replacement(
    site: Site,
    method: Method,
    by_position: bool,
    prompts: Prompts,
    reference: Prompts,
    positions: Positions,
    seed: int,
) -> Replacement:
    """Returns how a site's value is replaced, once what it takes is there.

    Args:
        site: the site.
        method: the value that is put there.
        by_position: whether means are of each position by itself.
        prompts: the prompts in which it is replaced.
        reference: the prompts whose values are used.
        positions: which positions are ablated.
        seed: of all draws.

    Raises:
        OptionError: if there is no such method, or by_position means nothing in it.
        PromptError: if no reference prompt has the length or the positions that it takes.
    """
    if method not in ("zero", "mean", "resample"):
        raise OptionError(f'`method` is "zero", "mean" or "resample", not {method!r}.', here())
    if by_position and method != "mean":
        raise OptionError("`by_position` is of means: give `method='mean'` with it.", here())
    if by_position and reference is prompts and len(prompts) == 1:
        raise OptionError(
            "The mean of one prompt at each position is what stands there: give `reference`.",
            here(),
        )
    drawn: tuple[int, ...] = ()
    if method == "resample":
        draw = random.Random(seed)
        drawn = tuple(_drawn(ids, row, reference, draw) for row, ids in enumerate(prompts.ids))
    if by_position:
        longest = max(reference.lengths)
        for row, length in enumerate(prompts.lengths):
            last = max(positions[row] or range(length), default=0)
            if last >= longest:
                raise PromptError(
                    f"Position {last} of prompt {row} is ablated by its mean, but the longest "
                    f"reference prompt has {longest} tokens.",
                    here(),
                )
    return Replacement(site, method, by_position, reference.lengths, drawn)


def _drawn(ids: torch.Tensor, row: int, reference: Prompts, draw: random.Random) -> int:
    """The number of another prompt of the same length."""
    fitting = [
        number
        for number, other in enumerate(reference.ids)
        if len(other) == len(ids) and not torch.equal(other, ids)
    ]
    if not fitting:
        raise PromptError(
            f"No other reference prompt has the {len(ids)} tokens of prompt {row}, so none can be "
            "drawn for it: give `reference` with some that have, or use `method='mean'`.",
            here(),
        )
    return draw.choice(fitting)
