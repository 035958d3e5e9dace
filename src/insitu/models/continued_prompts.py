"""Prompts that go on from a cache of the user's: their masks, their positions and their limits.

How the cache itself is copied is in `given_caches.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from insitu.graph.errors import PromptError
from insitu.graph.location import Location
from insitu.graph.user_warnings import warn_user
from insitu.models.given_caches import PAST, cached_length, is_unfilled
from insitu.models.padding import padding_of

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject
    from insitu.models.prompts import Prompt


def continued(model: LanguageSubject, prompt: Prompt, dry: bool) -> Prompt:
    """Returns a prompt of a forward that goes on from a cache, with its mask and its positions.

    The mask is of the cached positions too, as the model takes it.

    Args:
        model: the model.
        prompt: the prompt, whose cache is among its extras, if it has one.
        dry: whether weights are not to be loaded for that.

    Raises:
        PromptError: if the cache is of another number of rows, or they are too long together.
    """
    cache = prompt.extras.get(PAST)
    before = cached_length(cache)
    if not before or model.traits.is_encoder_decoder:
        if is_unfilled(cache):
            warn_user(
                "A cache that is given is left as it is, and this one is empty. Save "
                "`model.output.past_key_values` to have what the run fills.",
            )
        return prompt
    _check_fit(model, prompt, before)
    rows, length = prompt.ids.shape
    mask = prompt.extras.get("attention_mask")
    if mask is None and prompt.mask is not None:
        mask = torch.cat([prompt.mask.new_ones(rows, before), prompt.mask], 1)
    if mask is None or mask.ndim != 2:
        return prompt
    prompt = prompt._replace(extras={**prompt.extras, "attention_mask": mask})
    padding = (mask[:, :before].cumsum(1) == 0).sum(1, keepdim=True)
    positions = prompt.positions
    shifted = bool(padding.any()) and "position_ids" not in prompt.extras
    if positions is None and shifted and padding_of(model, dry).positions:
        positions = torch.arange(length).expand(rows, length)
    if positions is None:
        return prompt
    return prompt._replace(positions=positions + before - padding.to(positions.device))


def continued_generation(model: LanguageSubject, prompt: Prompt, beams: bool) -> Prompt:
    """Returns a prompt of a generation that goes on from a cache.

    Args:
        model: the model.
        prompt: the prompt, whose cache is among its extras, if it has one.
        beams: whether a row of the prompt has several in the generation.

    Raises:
        PromptError: if the prompt is not the whole text, or the cache of another number of rows.
    """
    before = cached_length(prompt.extras.get(PAST))
    if not before or model.traits.is_encoder_decoder:
        return prompt
    length = prompt.ids.shape[1]
    mask = prompt.extras.get("attention_mask")
    if length <= before or (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        raise PromptError(
            f"The prompt has {length} tokens and the cache holds {before} already. `generate` is "
            "given the whole text, the tokens in the cache first, and at least one more.",
            Location(*prompt.mark),
        )
    if not beams:
        _check_rows(prompt)
    return prompt


def without_cached(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of the forward that `generate` begins with, where there is a cache.

    Args:
        kwargs: the arguments, with the whole text.
    """
    before = cached_length(kwargs.get(PAST))
    new = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids", "token_type_ids"):
        if isinstance(new.get(name), torch.Tensor):
            new[name] = new[name][:, before:]
    return new


def _check_fit(model: LanguageSubject, prompt: Prompt, before: int) -> None:
    """Raises if a cache and a prompt do not go together."""
    length, context = prompt.ids.shape[1], model.traits.reader.limits.context
    if context is not None and before + length > context:
        raise PromptError(
            f"The prompt has {length} tokens and the cache holds {before}, but the model's context "
            f"is {context}.",
            Location(*prompt.mark),
        )
    _check_rows(prompt)


def _check_rows(prompt: Prompt) -> None:
    """Raises if a cache is of another number of rows than its prompt."""
    cache, rows = prompt.extras[PAST], prompt.ids.shape[0]
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if isinstance(keys, torch.Tensor) and keys.ndim == 4 and keys.shape[0] != rows:
        raise PromptError(
            f"The prompt has {rows} rows, and the cache has {keys.shape[0]}: a cache goes with the "
            "rows that have filled it.",
            Location(*prompt.mark),
        )
