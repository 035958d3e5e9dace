"""On which side a model's prompts are padded, and the position ids of those that are.

A model that looks back only is padded on the left, so that the last position is a token in every
row. Whether its rows are then what they are alone is tried in `padding_trial.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from insitu.models.attention import SETTING
from insitu.models.calls import arguments
from insitu.models.configuration import said
from insitu.models.padding_trial import Padding, find_padding
from insitu.models.prompts import Prompt, Side, positions_of
from insitu.models.rotary import warn_of_lengths
from insitu.models.tokens import vocabulary_of

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel


def padding_of(model: LanguageModel, dry: bool = False) -> Padding:
    """Returns how prompts of different length are padded in one invocation of a model.

    It is tried out once, with the weights, which are loaded for that.

    Args:
        model: the model.
        dry: whether they are not to be. Then it is supposed by the model's structure.
    """
    if not model.loaded and dry:
        return _supposed(model)
    model.load()
    known, implementation = model.paddings, said(model.config, SETTING)
    if implementation not in known:
        known[implementation] = _tried(model)
    return known[implementation]


def positioned(
    model: LanguageModel, prompt: Prompt, dry: bool = False, steps: int | None = None
) -> Prompt:
    """Returns a prompt with position ids, if the model would count padding among them.

    Args:
        model: the model.
        prompt: a prompt, with padding or without.
        dry: whether weights are not to be loaded for that.
        steps: how many steps a generation has, which makes its position ids itself; None for a
            forward.
    """
    mask = prompt.mask
    by_itself = steps is not None
    if mask is not None and (model.lengths.switches or model.growing):
        warn_of_lengths(model.lengths, mask.sum(1).tolist(), steps or 1)
    if mask is None or bool(mask[:, 0].all()) or "position_ids" in prompt.extras:
        return prompt
    padding = padding_of(model, dry)
    media = _sees_media(model, prompt)
    right = padding.hides if media and not by_itself else padding.exact
    if not right:
        _warn(type(model.module).__name__, "left")
    if media or by_itself or not padding.positions:
        return prompt
    return prompt._replace(positions=positions_of(mask))


def _sees_media(model: LanguageModel, prompt: Prompt) -> bool:
    """Whether a prompt has images, whose positions the model counts in a way of its own."""
    return bool(model.reader.media) and any(
        isinstance(value, torch.Tensor) and value.is_floating_point()
        for name, value in prompt.extras.items()
        if name != "inputs_embeds"
    )


def _supposed(model: LanguageModel) -> Padding:
    """The padding of a model as far as its structure tells."""
    module: Any = model.module
    causal = not model.is_encoder_decoder and (
        getattr(module, "can_generate", lambda: False)()
        or any(getattr(part, "is_causal", False) is True for part in module.modules())
    )
    counts = "position_ids" in model.forward_parameters
    return Padding("left" if causal else "right", True, counts)


def _tried(model: LanguageModel) -> Padding:
    """How a model is padded, as a few short runs of it show; what is amiss is said."""

    def run(prompt: Prompt, further: Mapping[str, Any]) -> Any:
        options = {"use_cache": False} if model.takes_use_cache else {}
        kwargs = {**arguments(model, prompt, options), **further}
        return model.module(**model.placed(kwargs))

    lengths = model.lengths
    longest = [model.reader.limits.context, lengths.grows, *lengths.switches]
    with model.in_use():
        try:
            found = find_padding(
                run,
                model.modules,
                model.config,
                "position_ids" in model.forward_parameters,
                vocabulary_of(model.module, model.config),
                model.pad_id,
                min((length for length in longest if length is not None), default=None),
            )
        except Exception:  # whatever the model makes of such runs: then nothing is known
            found = Padding("right", False, False)
    if model.snapshot.exchanges:  # short prompts, as these are, pass other modules than long ones
        _warn(type(model.module).__name__, "")
        return Padding("right", False, False, False)
    if _supposed(model).side == "left" and found.side == "right" and not found.exact:
        _warn(type(model.module).__name__, "right")
    return found


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
    warnings.warn(
        f"{name} {why}. {what}. An `invoke` for each prompt gives each what it has alone.",
        stacklevel=2,
    )
