"""On which side a model's prompts are padded, and the position ids of those that are.

A model that looks back only is padded on the left, so that the last position is a token in every
row. Whether its rows are then what they are alone is tried in `padding_trial.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from insitu.batching.demand import Side
from insitu.engine.fallback import Fallback, tried
from insitu.graph.user_warnings import warn_user
from insitu.models.attention import SETTING
from insitu.models.calls import arguments
from insitu.models.configuration import said
from insitu.models.padding_trial import Padding, TriedModel, find_padding, goes_on_as_alone
from insitu.models.pieces import lengths_of
from insitu.models.prompts import Prompt, positions_of
from insitu.models.rotary import forgetting_lengths, warn_of_lengths
from insitu.models.tokens import vocabulary_of

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject


def padding_of(model: LanguageSubject, dry: bool = False) -> Padding:
    """Returns how prompts of different length are padded in one invocation of a model.

    It is tried out once, with the weights, which are loaded for that. Where they are on a server,
    it is supposed by the model's structure, and the server tries it when it has the job.

    Args:
        model: the model.
        dry: whether they are not to be loaded. Then it is supposed too.
    """
    if not model.loaded and (dry or model.away is not None):
        return _supposed(model)
    model.load()
    known, implementation = model.traits.paddings, said(model.config, SETTING)
    if implementation not in known:
        known[implementation] = _tried(model)
    return known[implementation]


def positioned(
    model: LanguageSubject, prompt: Prompt, dry: bool = False, steps: int | None = None
) -> Prompt:
    """Returns a prompt with position ids, if the model would count padding among them.

    Args:
        model: the model.
        prompt: a prompt, with padding or without.
        dry: as of `padding_of`.
        steps: how many steps a generation has, which makes its position ids itself; None for a
            forward.
    """
    mask = prompt.mask
    generates = steps is not None
    if mask is not None:
        lengths = lengths_of(model)
        if lengths.switches or lengths.pieces or model.traits.growing:
            warn_of_lengths(lengths, mask.sum(1).tolist(), steps or 1)
    if mask is None:
        return prompt
    if generates and not model.traits.is_encoder_decoder and not bool(mask[:, -1].all()):
        _warn_of_padding_behind()
    if bool(mask[:, 0].all()) or "position_ids" in prompt.extras:
        return prompt
    padding = padding_of(model, dry)
    media = _sees_media(model, prompt)
    if generates:
        right = padding.hides if model.traits.is_encoder_decoder else padding.exact
        right = right and padding_shows(model) is None
    else:
        right = padding.hides if media else padding.exact
    if not right:
        _warn(type(model.module).__name__, "left")
    if padding.by_id:
        prompt = prompt._replace(ids=prompt.ids.masked_fill(mask == 0, model.traits.pad_id))
    if media or generates or not padding.positions:
        return prompt
    return prompt._replace(positions=positions_of(mask))


def padding_shows(model: LanguageSubject) -> str | None:
    """Returns why rows that are padded do not generate what they do alone, None if they do.

    It is tried once.

    Args:
        model: the model. Without weights nothing is tried, and they are supposed to.
    """
    if not model.loaded:
        return None
    known, implementation = model.traits.padded_generations, said(model.config, SETTING)
    if implementation not in known:
        known[implementation] = _tried_generation(model)
    return known[implementation]


def _tried_generation(model: LanguageSubject) -> str | None:
    """Why padding shows in a generation, as a few short ones tell."""
    module: Any = model.module
    side: Side = "right" if model.traits.is_encoder_decoder else "left"

    def generate(prompt: Prompt, options: Mapping[str, Any]) -> Any:
        kwargs = {"input_ids": prompt.ids, "attention_mask": prompt.visible_mask, **options}
        with forgetting_lengths(model.traits.growing):
            return module.generate(
                **model.traits.placement.moved({**kwargs, "pad_token_id": model.traits.pad_id})
            )

    given = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = [given] if isinstance(given, int) else list(given or ())
    with model.in_use():
        alike = tried(
            lambda: goes_on_as_alone(generate, _to_be_tried(model), side, ends),
            "a generation with padding",
        )
    if isinstance(alike, Fallback):
        return alike.why
    return None if alike else "in a generation padding changes what a prompt is alone"


def _sees_media(model: LanguageSubject, prompt: Prompt) -> bool:
    """Whether a prompt has images, whose positions the model counts in a way of its own."""
    return bool(model.traits.reader.media) and any(
        isinstance(value, torch.Tensor) and value.is_floating_point()
        for name, value in prompt.extras.items()
        if name != "inputs_embeds"
    )


def _supposed(model: LanguageSubject) -> Padding:
    """The padding of a model as far as its structure tells."""
    module: Any = model.module
    causal = not model.traits.is_encoder_decoder and (
        getattr(module, "can_generate", lambda: False)()
        or any(getattr(part, "is_causal", False) is True for part in module.modules())
    )
    counts = "position_ids" in model.traits.forward_parameters
    return Padding("left" if causal else "right", True, counts)


def _tried(model: LanguageSubject) -> Padding:
    """How a model is padded, as a few short runs of it show; warns of all that is amiss."""

    def run(prompt: Prompt, further: Mapping[str, Any]) -> Any:
        options = {"use_cache": False} if model.traits.takes_use_cache else {}
        kwargs = {**arguments(model, prompt, options), **further}
        return model.module(**model.traits.placement.moved(kwargs))

    with model.in_use():
        found = tried(
            lambda: find_padding(
                run, _to_be_tried(model), "position_ids" in model.traits.forward_parameters
            ),
            "padding",
        )
    if isinstance(found, Fallback):  # nothing is known then
        found = Padding("right", False, False)
    if model.snapshot.exchanges:  # short prompts, as these are, pass other modules than long ones
        _warn(type(model.module).__name__, "")
        return Padding("right", False, False, False)
    if _supposed(model).side == "left" and found.side == "right" and not found.exact:
        _warn(type(model.module).__name__, "right")
    return found


def _to_be_tried(model: LanguageSubject) -> TriedModel:
    """What a trial needs to know of a model with its weights."""
    vocabulary = vocabulary_of(model.module, model.config)
    pad_id = model.traits.pad_id
    return TriedModel(model.snapshot, model.config, vocabulary, pad_id, _longest(model))


def _longest(model: LanguageSubject) -> int | None:
    """The most tokens of a prompt that a model treats as it does short ones, if there is a most."""
    lengths = model.traits.lengths
    longest = [model.traits.reader.limits.context, lengths.grows, *lengths.switches]
    return min((length for length in longest if length is not None), default=None)


def warn_of_counting(setting: str) -> None:
    """Says that a setting of a generation takes padding for tokens of the shorter rows.

    Args:
        setting: its name.
    """
    warn_user(
        f"`{setting}` counts padding as tokens of the shorter rows of this prompt, which may get "
        "other tokens than alone. An `invoke` for each prompt gives each what it has alone.",
    )


def _warn_of_padding_behind() -> None:
    """Says that a generation goes on behind padding."""
    warn_user(
        "The prompt is padded on the right, and `generate` goes on behind the padding: the shorter "
        "rows get other tokens than alone. Pad it on the left (`tokenizer.padding_side = 'left'`), "
        "or give the list of prompts itself.",
    )


def _warn(name: str, side: Side | Literal[""]) -> None:
    """Says that rows which are padded are not what they are alone: on a side, or on any."""
    what = (
        "A list of prompts is padded on the right, where `[:, -1]` is padding for the shorter "
        "ones: `mask` says where"
        if side == "right"
        else "The shorter rows of this prompt have other values than they have alone"
    )
    why = (
        "does not hide padding before a prompt"
        if side
        else "computes in other ways for short prompts than for long ones"
    )
    warn_user(
        f"{name} {why}. {what}. An `invoke` for each prompt gives each what it has alone.",
    )
