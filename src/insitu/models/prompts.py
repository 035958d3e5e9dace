"""Prompts as token ids: what one is, and how it is made of rows, tensors and masks.

How the forms in which one can be given are told apart is in `reader.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from insitu.batching.demand import Side
from insitu.graph.errors import PromptError, PromptTypeError
from insitu.graph.location import Location, Mark
from insitu.models.chats import CHOICE
from insitu.models.media import MEDIA

PROMPTS = ("input_ids", "inputs_embeds")
"""What a prompt is called where it is given by keyword, as every forward of Transformers does."""

WITH_PROMPTS = ("attention_mask", "position_ids", "token_type_ids", CHOICE, *MEDIA)
"""What goes with one prompt and not with a whole block."""

_NOTHING: Mapping[str, Any] = {}


class Prompt(NamedTuple):
    """One invocation's prompt.

    Attributes:
        ids: token ids `(rows, position)`, int64.
        mark: the user's line.
        mask: 1 for tokens and 0 for padding, of the same shape; None if there is no padding.
        extras: all else that a tokenizer or a processor returned for the model, or the user gave
            with the prompt. Of embeddings, `inputs_embeds` among them, `ids` have the shape only.
        seed: where the sampling of this invocation starts, or None.
        positions: position ids of the same shape, where padding would shift those that the model
            counts by itself.
        steps: how many tokens this invocation is to get at most, where it has a number of its own.
        demands: options of the run that values of this invocation take, such as which
            implementation of attention.
        padded: on which side shorter prompts of a list were padded, None if that was not done
            here.
    """

    ids: torch.Tensor
    mark: Mark
    mask: torch.Tensor | None = None
    extras: Mapping[str, Any] = _NOTHING
    seed: int | None = None
    positions: torch.Tensor | None = None
    steps: int | None = None
    demands: Mapping[str, Any] = _NOTHING
    padded: Side | None = None

    @property
    def token_ids(self) -> torch.Tensor:
        """The token ids, for the user.

        Raises:
            PromptError: if the prompt was given as embeddings.
        """
        if "inputs_embeds" in self.extras and "input_ids" not in self.extras:
            raise PromptError(
                "The prompt was given as embeddings, so it has no token ids.", Location(*self.mark)
            )
        return self.ids

    @property
    def visible_mask(self) -> torch.Tensor:
        """The mask, of ones where there is no padding."""
        return torch.ones_like(self.ids) if self.mask is None else self.mask

    def demanding(self, options: Mapping[str, Any]) -> Prompt:
        """Returns the prompt with further options that values of its invocation take."""
        if options.items() <= self.demands.items():
            return self
        return self._replace(demands={**self.demands, **options})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model can process.

    Attributes:
        vocabulary: how many token ids it has, from 0.
        context: the most positions, or None if there is no such number.
        width: how many numbers an embedding has, d_model, or None if that is not known.
    """

    vocabulary: int | None
    context: int | None
    width: int | None = None


def as_ids(tensor: torch.Tensor, mark: Mark) -> torch.Tensor:
    """Returns a tensor of ids as int64 with two axes.

    Args:
        tensor: the ids, `(position,)` or `(rows, position)`.
        mark: the user's line.

    Raises:
        PromptTypeError: if it has another shape, or is of no integers.
    """
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise PromptTypeError(
            f"Token ids are integers, but this tensor is {tensor.dtype}. Embeddings are given as "
            "`inputs_embeds=`, of shape (rows, position, d_model).",
            Location(*mark),
        )
    if tensor.ndim not in (1, 2):
        raise PromptTypeError(
            "Token ids have the shape (position,) or (rows, position), but this tensor has the "
            f"shape {tuple(tensor.shape)}.",
            Location(*mark),
        )
    ids = tensor if tensor.dtype is torch.int64 else tensor.long()
    return ids[None] if ids.ndim == 1 else ids


def masked(prompt: Prompt, mask: Any, cached: int = 0) -> Prompt:
    """Returns a prompt with an attention mask of the user's or a tokenizer's.

    Args:
        prompt: the prompt.
        mask: 1 for tokens and 0 for padding, of any dtype; or one for each pair of positions,
            with four axes.
        cached: how many positions there are in a cache before the prompt. The mask may be of
            these too.

    Raises:
        PromptError: if it is of another size, or says anything else.
    """
    try:
        given = mask if isinstance(mask, torch.Tensor) else torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):  # which one depends on what it is
        raise PromptError(
            f"The attention mask is {kind_of(mask)}, and not a number for each token.",
            Location(*prompt.mark),
        ) from None
    if given.ndim > 2:  # of the user's own making, for each pair of positions
        return prompt._replace(extras={**prompt.extras, "attention_mask": given})
    if prompt.mask is not None:
        raise PromptError(
            "These prompts are of different length, so they are padded here, and a mask of yours "
            "does not say where. Give what a tokenizer returns with `padding=True`.",
            Location(*prompt.mark),
        )
    rows, length = prompt.ids.shape
    if cached and given.shape == (rows, cached + length):
        own = masked(prompt, given[:, cached:])
        masked(own._replace(mask=None, ids=given[:, :cached]), given[:, :cached])  # raises
        if bool(given[:, :cached].all()):
            return own
        return own._replace(extras={**own.extras, "attention_mask": given.long()})
    if given.numel() != prompt.ids.numel():
        raise PromptError(
            f"The attention mask has the shape {tuple(given.shape)}, but the prompt has "
            f"{tuple(prompt.ids.shape)}.",
            Location(*prompt.mark),
        )
    given = given.reshape(prompt.ids.shape)
    if not bool(((given == 0) | (given == 1)).all()):
        raise PromptError(
            "An attention mask has 1 for tokens and 0 for padding, and no other numbers. One that "
            "is added to scores has four axes.",
            Location(*prompt.mark),
        )
    return prompt if bool(given.all()) else prompt._replace(mask=given.long())


def laid_out(prompt: Prompt, name: str, lists: Any) -> torch.Tensor:
    """Returns numbers that a tokenizer gave for tokens, where the tokens lie in a prompt.

    Args:
        prompt: the prompt.
        name: what they are called, such as "token_type_ids".
        lists: a number for each token, in lists as long as those of the ids.

    Raises:
        PromptError: if they are not.
    """
    shape = prompt.ids.shape
    try:
        if prompt.mask is None:
            return torch.tensor(lists, dtype=torch.int64).reshape(shape)
        counts = [len(row) for row in lists]
        numbers = torch.tensor([number for row in lists for number in row], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError):
        counts, numbers = [], prompt.ids
    if prompt.mask is None or counts != prompt.mask.sum(-1).tolist():
        raise PromptError(
            f"`{name}` of the prompt is no number for each of its tokens. Options of the run are "
            "given to the method that runs it.",
            Location(*prompt.mark),
        )
    made = torch.zeros_like(prompt.ids)
    made[prompt.mask.bool()] = numbers
    return made


def check_lengths(prompt: Prompt) -> None:
    """Raises if what goes with each token of a prompt is of another number of tokens.

    Args:
        prompt: the prompt.

    Raises:
        PromptError: naming both shapes.
    """
    for name in ("position_ids", "token_type_ids"):
        given = prompt.extras.get(name)
        if isinstance(given, torch.Tensor) and given.shape[-1:] != prompt.ids.shape[-1:]:
            raise PromptError(
                f"`{name}` has the shape {tuple(given.shape)}, but the prompt has the shape "
                f"{tuple(prompt.ids.shape)}.",
                Location(*prompt.mark),
            )


def padded(
    rows: list[list[int]], side: Side | Callable[[], Side], pad_id: int, mark: Mark
) -> Prompt:
    """Returns rows of ids as one prompt, with a mask if they had to be padded.

    Args:
        rows: the rows.
        side: where they are padded, or a function that is asked if they have to be.
        pad_id: what padding is filled with.
        mark: the user's line.
    """
    length = max(map(len, rows), default=0)
    if all(len(row) == length for row in rows):
        return Prompt(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length), mark)
    side = side() if callable(side) else side
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        here = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[place, here] = torch.tensor(row)
        mask[place, here] = 1
    return Prompt(ids, mark, mask, padded=side)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Returns the position ids `(rows, position)` of rows with padding before them.

    Args:
        mask: 1 for tokens and 0 for padding, of the same shape. Tokens that are hidden behind the
            first one still count.
    """
    before = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - before).clamp_min(0)


def counted(prompt: Prompt, side: Side) -> Prompt:
    """Returns a prompt with position ids, if it is padded on the left, in a batch of such.

    Args:
        prompt: the prompt, which may be a batch of several.
        side: where it is padded.
    """
    if side == "right":
        return prompt
    return prompt._replace(positions=positions_of(prompt.visible_mask))


def kind_of(value: object) -> str:
    """Returns what a value is, for a message: "a list"."""
    return f"a {type(value).__name__}"
