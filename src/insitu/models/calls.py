"""One forward of a language model: its keyword arguments, and what it costs in memory."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.batching.pass_plan import PassPlan
from insitu.engine.model_call import Pass
from insitu.models.attention import OPTION, attending
from insitu.models.given_caches import own_copies
from insitu.models.prompts import Prompt
from insitu.models.rotary import forgetting_lengths

if TYPE_CHECKING:
    from insitu.models.language_subject import LanguageSubject

_SMALL = 4096  # tokens that are always thought to fit


def default_budget(model: LanguageSubject, tokens: int) -> int:
    """Returns how many tokens fit into a quarter of the memory that is free now, about.

    Args:
        model: the model.
        tokens: how many there are in all: if they fit, it does not matter how many more would.
    """
    if tokens <= _SMALL:
        return _SMALL
    device = model.traits.placement.device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fitting = max(_SMALL, free // 4 // model.traits.bytes_per_token)
    return 1 << min(fitting, tokens * 2).bit_length() - 1  # so that it is seldom another one


def content(number: int, prompt: Prompt) -> Hashable:
    """Returns a key that is equal for invocations of equal prompts, as far as that is known.

    Args:
        number: the number of the invocation.
        prompt: its prompt.
    """
    if prompt.mask is not None or prompt.ids.device.type != "cpu":
        return number
    return (prompt.ids.shape[0], prompt.ids.numpy().tobytes())


def arguments(model: LanguageSubject, prompt: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a prompt's forward."""
    ids, _, mask, extras, _, positions, _, demands, _ = prompt
    kwargs: dict[str, Any] = {"input_ids": ids, **options}
    if extras or demands:
        kwargs = {"input_ids": ids, **demands, **extras, **options}
        if "inputs_embeds" in extras:
            del kwargs["input_ids"]
    if mask is not None and "attention_mask" not in extras:
        kwargs["attention_mask"] = mask
    if positions is not None:
        kwargs["position_ids"] = positions
    if model.traits.is_encoder_decoder and kwargs.keys().isdisjoint(_GIVEN_TO_A_DECODER):
        start = model.traits.decoder_start
        if start is not None:
            kwargs["decoder_input_ids"] = torch.full((prompt.ids.shape[0], 1), start)
    return kwargs


_GIVEN_TO_A_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")


_PLAIN = frozenset(["input_ids", "attention_mask", "position_ids", "use_cache"])
"""Arguments that a forward does not fill. Most forwards have no others."""


def alone(
    model: LanguageSubject,
    module: nn.Module,
    options: Mapping[str, Any],
    single: PassPlan,
    prompt: Prompt,
) -> Pass:
    """Returns the pass of an invocation that has it for itself.

    Args:
        model: the model.
        module: the wrapped module.
        options: keyword arguments for the forward.
        single: its plan.
        prompt: the invocation's prompt.
    """
    kwargs = arguments(model, prompt, options)
    way = forward_with if kwargs.keys() <= _PLAIN else forward
    call = partial(way, model, module, kwargs, [prompt])
    cuts = {single.rows[0].invocation: None}
    # `Pass(...)`, in a third of the time.
    return tuple.__new__(Pass, (call, cuts, True, None, None, None, single.differentiates))


def forward(
    model: LanguageSubject,
    module: nn.Module,
    kwargs: dict[str, Any],
    requests: Sequence[Prompt],
    *_: object,
) -> Any:
    """Makes a forward on copies of what the user gives, in each run anew.

    It ignores what a pass is called with, so that it can be the whole of one.
    """
    return forward_with(model, module, own_copies(kwargs), requests)


def forward_with(
    model: LanguageSubject,
    module: nn.Module,
    kwargs: dict[str, Any],
    requests: Sequence[Prompt],
    *_: object,
) -> Any:
    """Makes a forward that may fill what it is given, in the thread whose turn it is.

    It may be the whole of a pass, as `forward` may.
    """
    # Moved here and not before: until its turn comes, another thread's probe may have put fake
    # weights in, and those do not say where the real ones are.
    if "input_ids" not in kwargs or not model.traits.placement.has(kwargs["input_ids"]):
        kwargs = model.traits.placement.moved(kwargs)
    if OPTION in kwargs:
        kwargs = dict(kwargs)
        with attending(module, kwargs.pop(OPTION)):
            return forward_with(model, module, kwargs, requests)
    try:
        if model.traits.growing:
            with forgetting_lengths(model.traits.growing):
                return module(**kwargs)
        return module(**kwargs)
    except IndexError:
        model.traits.reader.check(requests)
        raise
