"""What a Transformers model says of its token ids: how many there are, and what some are for.

It is read from the module and its configs, whatever the tokenizer says. How prompts become token
ids is in `prompts.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

from insitu.models.prompts import Limits


def reads_tokens(module: Any) -> bool:
    """Returns whether a model takes token ids, and has one embedding for them."""
    if "input_ids" not in inspect.signature(type(module).forward).parameters:
        return False
    try:
        return module.get_input_embeddings() is not None
    except NotImplementedError:  # it has more than one, or none
        return False


def limits_of(module: Any, config: Any) -> Limits:
    """Returns which prompts a model takes, as far as it says.

    Args:
        module: the model.
        config: its config.
    """
    return Limits(
        getattr(module.get_input_embeddings(), "num_embeddings", None),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        getattr(module.get_input_embeddings(), "embedding_dim", None),
    )


def vocabulary_of(module: Any, config: Any) -> int:
    """Returns how many token ids a model has.

    Args:
        module: the model.
        config: its config.
    """
    return limits_of(module, config).vocabulary or config.get_text_config().vocab_size


def padding(module: Any, config: Any) -> int:
    """Returns the token with which shorter prompts are filled up, whatever it is: it is masked.

    Args:
        module: the model.
        config: its config.
    """
    generation = getattr(module, "generation_config", None)
    text, known = config.get_text_config(), vocabulary_of(module, config)
    pads = (getattr(generation, "pad_token_id", None), text.pad_token_id, text.eos_token_id)
    pads = [pad[0] if isinstance(pad, list) else pad for pad in pads]
    return next((pad for pad in pads if pad is not None and 0 <= pad < known), 0)


def decoder_start(module: Any, config: Any) -> int | None:
    """Returns the token with which a decoder begins, None where there is none beside an encoder.

    Args:
        module: the model.
        config: its config.
    """
    if not config.is_encoder_decoder:
        return None
    configs = (getattr(module, "generation_config", None), config)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for each in configs:
            start = getattr(each, name, None)
            if isinstance(start, list):
                start = start[0]
            if start is not None:
                return start
    return None
