"""What a Transformers model says of its token ids: how many there are, and what some are for.

It is read from the module and its configs, and not from the tokenizer. How prompts become token ids
is in `prompts.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from insitu.models.configuration import first_id, said, text_config
from insitu.models.estimates import weight_of
from insitu.models.prompts import Limits


def reads_tokens(module: Any) -> bool:
    """Returns whether a model takes token ids, and has one embedding for them."""
    base = getattr(module, "get_base_model", None)  # PEFT's own forward may take anything
    inner = module if base is None else base()
    if "input_ids" not in inspect.signature(type(inner).forward).parameters:
        return False
    try:
        embedding = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        # Transformers raises NotImplementedError for a class whose input embedding it does not
        # find, because there is none or more than one. AttributeError comes from a class whose
        # own method asks for a part that this model lacks. Without one embedding, tokens cannot
        # be placed or padded: the caller refuses the model as a language model, with a reason.
        return False
    # A method gives the weight where torch has quantised it. A list of embeddings has none.
    weight = getattr(embedding, "weight", None)
    return isinstance(weight, torch.Tensor) or callable(weight)


def limits_of(module: Any, config: Any) -> Limits:
    """Returns which prompts a model takes, as far as it says.

    Args:
        module: the model.
        config: its config.
    """
    context = said(text_config(config), "max_position_embeddings")
    # A model without a limit says so with a number below 1.
    limited = isinstance(context, int) and context > 0
    return Limits(
        getattr(module.get_input_embeddings(), "num_embeddings", None),
        context if limited else None,
        getattr(module.get_input_embeddings(), "embedding_dim", None),
    )


def vocabulary_of(module: Any, config: Any) -> int:
    """Returns how many token ids a model has.

    Args:
        module: the model.
        config: its config.
    """
    size = limits_of(module, config).vocabulary or said(text_config(config), "vocab_size")
    return size or weight_of(module.get_input_embeddings()).shape[0]


def padding(module: Any, config: Any) -> int:
    """Returns the token with which shorter prompts are filled up. Any would do: it is masked.

    Args:
        module: the model.
        config: its config.
    """
    generation = getattr(module, "generation_config", None)
    text, known = text_config(config), vocabulary_of(module, config)
    given = (
        said(generation, "pad_token_id"),
        said(text, "pad_token_id"),
        said(text, "eos_token_id"),
    )
    pads = (first_id(each) for each in given)
    return next((pad for pad in pads if pad is not None and 0 <= pad < known), 0)


def decodes(module: Any, config: Any) -> bool:
    """Returns whether a model is an encoder and a decoder.

    A part of such a model that stands alone is none, although it may have the same config.

    Args:
        module: the model.
        config: its config.
    """
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # of PEFT
    takes = "decoder_input_ids" in inspect.signature(inner.forward).parameters
    return takes and bool(said(config, "is_encoder_decoder", default=True))


def decoder_start(module: Any, config: Any) -> int | None:
    """Returns the token with which a decoder begins, None where there is none beside an encoder.

    A classifier's decoder reads the prompt, which the model hands on to it itself.

    Args:
        module: the model.
        config: its config.
    """
    if not decodes(module, config):
        return None
    if not getattr(module, "can_generate", lambda: True)() and _has_head(module):
        return None
    configs = (getattr(module, "generation_config", None), config)
    names = ("decoder_start_token_id", "bos_token_id")
    return first_id(*(said(each, name) for name in names for each in configs))


def _has_head(module: Any) -> bool:
    """Whether a model has parameters beside those of an encoder, a decoder and embeddings."""
    parts = [getattr(module, name, lambda: None)() for name in ("get_encoder", "get_decoder")]
    return any(
        child not in parts
        and not isinstance(child, nn.Embedding)
        and next(child.parameters(), None) is not None
        for child in module.children()
    )
