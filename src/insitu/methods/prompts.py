"""Prompts of a method: each by itself, as token ids and as the words to label them with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu.display.axis import Axis
from insitu.graph.errors import PromptError
from insitu.graph.location import here, mark
from insitu.methods.sites import chosen, numbers_of
from insitu.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Prompts:
    """What a method was given to look at.

    Attributes:
        ids: the token ids of each prompt, `(position,)`.
        tokens: each of them as text.
        many: whether several were given, even if these are one: results have a `prompt` axis then.
        labels: what positions are called, if they were chosen as such; None for tokens or numbers.
    """

    ids: tuple[torch.Tensor, ...]
    tokens: tuple[tuple[str, ...], ...]
    many: bool
    labels: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each has."""
        return tuple(len(ids) for ids in self.ids)

    @property
    def axis(self) -> tuple[Axis, ...]:
        """The axis of the prompts: none if there is but one that was given alone."""
        return (Axis.of("prompt", range(len(self))),) if self.many else ()

    def positions(self, name: str = "position") -> Axis:
        """The axis of positions: tokens, or numbers where prompts do not have the same ones.

        Args:
            name: what it is called.
        """
        if len(set(self.tokens)) == 1:
            return Axis(name, self.tokens[0])
        if self.labels is not None:
            return Axis(name, self.labels)
        return Axis.of(name, range(max(self.lengths)))

    def at(self, positions: int | Iterable[int] | None) -> tuple[Prompts, list[list[int]]]:
        """Returns them as if they had some positions only, and which ones these are in each.

        Args:
            positions: one or several, from the end if negative; None for all.

        Raises:
            OptionError: if a prompt has no such position.
        """
        asked = numbers_of("position", positions)
        if asked is None:
            return self, [list(range(length)) for length in self.lengths]
        places = [chosen("position", asked, length) for length in self.lengths]
        ids = tuple(own[place] for own, place in zip(self.ids, places, strict=True))
        tokens = tuple(
            tuple(own[one] for one in place) for own, place in zip(self.tokens, places, strict=True)
        )
        return Prompts(ids, tokens, self.many, tuple(map(str, asked))), places

    def stacked(self, values: Sequence[torch.Tensor], *positions: int) -> torch.Tensor:
        """Returns what was found of each prompt as one tensor, with the prompts' axis if any.

        Args:
            values: of each prompt.
            positions: which of their axes are positions: prompts that are shorter than others
                are filled up with NaN there.
        """
        if not self.many:
            return values[0]
        longest, filled = max(self.lengths), []
        for value in values:
            shape = list(value.shape)
            for axis in positions:
                shape[axis] = longest
            missing = float("nan") if value.is_floating_point() else -1
            whole = value.new_full(shape, missing) if positions else value.clone()
            whole[tuple(slice(size) for size in value.shape)] = value
            filled.append(whole)
        return torch.stack(filled)


def read_prompts(model: LanguageModel, prompts: Any) -> Prompts:
    """Returns prompts apart.

    Args:
        model: the model.
        prompts: in any form that `invoke` takes; several strings, lists of ids or rows are
            prompts of their own, of any length.

    Raises:
        PromptTypeError: if it is of no known form.
        PromptError: if it is empty, too long, or has ids that the model does not know; or if more
            goes with it than a mask, such as embeddings or token types, which would be left out.
            Also if the mask hides all tokens, or some between others.
    """
    read = model.traits.reader.read(prompts, "right", mark())
    beside = [name for name, value in read.extras.items() if not _says_nothing(name, value)]
    if beside:
        raise PromptError(
            f"Methods take prompts as token ids, and `{beside[0]}` would be left out: write the "
            "experiment as a trace, which takes it.",
            here(),
        )
    model.traits.reader.check_length(read)
    model.traits.reader.check_ids(read)
    masks = [mask.bool() for mask in read.visible_mask]
    for row, mask in enumerate(masks):
        seen = mask.nonzero()
        if not len(seen):
            raise PromptError(f"The mask of prompt {row} hides all of its tokens.", here())
        if int(seen[-1] - seen[0]) >= len(seen):  # those behind would stand at other positions
            raise PromptError(
                f"The mask of prompt {row} hides tokens between others, and methods take prompts "
                "without what their masks hide: write the experiment as a trace, which keeps it.",
                here(),
            )
    rows = tuple(ids[mask] for ids, mask in zip(read.ids, masks, strict=True))
    return Prompts(rows, tuple(words(model, ids.tolist()) for ids in rows), _many(prompts))


def words(model: LanguageModel, ids: Sequence[int]) -> tuple[str, ...]:
    """Returns token ids as text, each by itself; as numbers if the model has no tokenizer.

    Args:
        model: the model.
        ids: the token ids.
    """
    tokenizer = model._tokenizer
    if tokenizer is None or isinstance(tokenizer, Exception):
        return tuple(map(str, ids))
    return tuple(tokenizer.decode([token]) for token in ids)


def _says_nothing(name: str, value: Any) -> bool:
    """Whether what goes with a prompt is what the model would take without it."""
    return name == "token_type_ids" and isinstance(value, torch.Tensor) and not value.any()


def _many(prompts: Any) -> bool:
    """Whether several prompts were given."""
    if isinstance(prompts, Mapping):
        prompts = prompts["input_ids"]
    if isinstance(prompts, torch.Tensor):
        return prompts.ndim > 1
    if isinstance(prompts, str):
        return False
    first = next(iter(prompts))
    return not isinstance(first, int | Mapping)
