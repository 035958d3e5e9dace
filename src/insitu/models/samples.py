"""A small call of a Transformers model, to see how it works: its tokens do not matter."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from insitu.engine.probe import Call
from insitu.models.tokens import decodes

_LENGTHS = (7, 11, 13, 17, 19, 23, 29, 31, 37)


def sample_lengths(config: Any) -> tuple[int, int]:
    """Returns two numbers of positions that no other size of a model is equal to.

    Args:
        config: the model's config.
    """
    sizes: set[int] = set()
    waiting = [vars(config)]
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, int):
                sizes.add(value)
            elif hasattr(value, "get_text_config"):
                waiting.append(vars(value))
    # What sizes are divided by, such as the size of a head.
    sizes |= {a // b for a in sizes for b in sizes if b > 1 and a % b == 0}
    first, second = [length for length in _LENGTHS if length not in sizes][:2]
    return first, second


def sample_call(module: nn.Module, config: Any) -> Call | None:
    """Returns arguments for a model's forward with two rows, None if it is not known what it takes.

    Args:
        module: the model, with weights or without.
        config: its config.
    """
    base: Any = getattr(module, "get_base_model", None)  # PEFT's own forward may take anything
    inner = module if base is None else base()
    takes: Collection[str] = inspect.signature(inner.forward).parameters
    length, other = sample_lengths(config)
    kwargs: dict[str, Any] = {}
    images = _images(config) if "pixel_values" in takes else None
    if "input_features" in takes and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 1500)
        kwargs["input_features"] = torch.zeros(2, config.num_mel_bins, frames)
        if "decoder_input_ids" in takes:
            kwargs["decoder_input_ids"] = _ids(2, length, config)
    elif "input_ids" in takes:
        kwargs["input_ids"] = _ids(2, length, config)
        if decodes(module, config):
            kwargs["decoder_input_ids"] = _ids(2, other, config)
        # Where images have tokens of their own among the text's, text alone will do.
        if images is not None and not any(hasattr(config, name) for name in _IMAGE_TOKENS):
            kwargs["pixel_values"] = images
    elif images is not None:
        kwargs["pixel_values"] = images
    if not kwargs:
        return None
    floats = next((part for part in module.parameters() if part.is_floating_point()), None)
    if floats is not None:
        for name, value in kwargs.items():
            if value.is_floating_point():
                kwargs[name] = value.to(floats.dtype)
    if "use_cache" in takes:
        kwargs["use_cache"] = False
    return Call((), kwargs)


_IMAGE_TOKENS = ("image_token_id", "image_token_index")


def _images(config: Any) -> torch.Tensor | None:
    """Two images of the size that a model takes, None if its config does not say."""
    vision = getattr(config, "vision_config", config)
    size: Any = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return torch.zeros(2, getattr(vision, "num_channels", 3), height, width)


def _ids(rows: int, length: int, config: Any) -> torch.Tensor:
    """Token ids, all different where the vocabulary has as many."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    count = min(known, 50) if isinstance(known, int) and known > 0 else 50
    return torch.arange(4, 4 + rows * length).reshape(rows, length) % count
