"""Pairs of prompts, a clean and a corrupted one, and the scale that the two of them make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from insitu.display.axis import Axis
from insitu.display.labels import POSITIONS
from insitu.graph.errors import OptionError, PromptError
from insitu.graph.location import here
from insitu.methods.prompts import Prompts, read_prompts
from insitu.methods.sites import Site
from insitu.models.language_model import LanguageModel

Choice: TypeAlias = int | Iterable[int] | None
"""One of something or several, from the end if negative; None for all."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Clean and corrupted prompts, as many of the ones as of the others.

    Attributes:
        clean: the clean ones.
        corrupted: the corrupted ones.
    """

    clean: Prompts
    corrupted: Prompts

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def unequal(self) -> int | None:
        """The number of the first pair whose prompts have different lengths, None if none has."""
        pairs = zip(self.clean.lengths, self.corrupted.lengths, strict=True)
        return next((number for number, (one, other) in enumerate(pairs) if one != other), None)

    def told(self, number: int) -> str:
        """Returns how long the prompts of a pair are, as words."""
        where = f"of pair {number} " if self.clean.many else ""
        one, other = self.clean.lengths[number], self.corrupted.lengths[number]
        return f"the clean prompt {where}has {one} tokens, and the corrupted one {other}"

    def check(self, sites: Iterable[Site], positions: object) -> None:
        """Raises a `PromptError` if the prompts of a pair have no parts for each other.

        Args:
            sites: the values that are taken of both.
            positions: which positions were chosen; None if none were.
        """
        number = self.unequal
        if number is None:
            return
        if any("key" in site.axes for site in sites):
            raise PromptError(
                "Scores and patterns are patched between prompts of one length, and "
                f"{self.told(number)}.",
                here(),
            )
        if positions is None:
            raise PromptError(
                f"Positions are patched one for one, and {self.told(number)}: make them equally "
                "long, or choose positions that mean the same in both, such as `positions=[-1]`.",
                here(),
            )

    def positions(self, name: str, positions: Choice) -> Axis:
        """The axis of the clean prompts' positions.

        Args:
            name: what it is called: there are keys for all positions, also if some are chosen.
            positions: which ones; None for all.
        """
        return self.clean.at(None if name == "key" else positions)[0].positions(name)

    def tokens(self, by: Sequence[str], positions: Choice) -> tuple[tuple[str, ...], ...]:
        """The tokens at the positions of a result, of each clean prompt; none without positions.

        Args:
            by: its axes.
            positions: which positions were chosen; None for all.
        """
        if not set(by) & set(POSITIONS):
            return ()
        return self.clean.at(None if "key" in by else positions)[0].tokens

    def ends(
        self, measured: torch.Tensor, noising: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Returns the metric of the prompts as they are, and from where to where patching leads.

        Args:
            measured: the metric of each pair's prompts, `(prompt, 2)`.
            noising: whether it is the clean prompt that is run.

        Returns:
            Both as details of a result, and the one of the prompt that is run before the other.
        """
        measured = measured.float() if self.clean.many else measured.float()[0]
        clean, corrupted = measured.unbind(-1)
        details = {"clean": clean, "corrupted": corrupted}
        return details, *((clean, corrupted) if noising else (corrupted, clean))


def read_pairs(model: LanguageModel, clean: Any, corrupted: Any) -> Pairs:
    """Returns prompts in pairs.

    Args:
        model: the model.
        clean: a prompt, or several.
        corrupted: one for each of these.

    Raises:
        PromptError: if there are not as many of the ones as of the others, or one is not right.
    """
    pairs = Pairs(read_prompts(model, clean), read_prompts(model, corrupted))
    if len(pairs.clean) != len(pairs.corrupted):
        raise PromptError(
            f"There are {len(pairs.clean)} clean prompts and {len(pairs.corrupted)} corrupted "
            "ones: they are patched in pairs, so give one for each.",
            here(),
        )
    return pairs


def share(
    values: torch.Tensor, start: torch.Tensor, end: torch.Tensor, pairs: Pairs
) -> torch.Tensor:
    """Returns how far values have come from one number to another, as a share of the way.

    Args:
        values: measured, with an axis of pairs first if there are several.
        start: where that share is 0, `(prompt,)` or `()`.
        end: where it is 1, of the same shape.
        pairs: the pairs.

    Raises:
        OptionError: if it is nowhere, because the two are equal.
    """
    same = (start == end).flatten().nonzero().flatten().tolist()
    if same:
        of = f" of pair {same[0]}" if pairs.clean.many else ""
        raise OptionError(
            f"The metric is {float(start.flatten()[same[0]]):.4g} of both prompts{of}, so there "
            "is nothing to take shares of: write `normalised=False` for the metric itself.",
            here(),
        )
    shape = (*start.shape, *[1] * (values.ndim - start.ndim))
    return (values - start.reshape(shape)) / (end - start).reshape(shape)
