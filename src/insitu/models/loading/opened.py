"""What a model is made of when it is wrapped: a module in memory, or files and a tree of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from insitu.engine.eager import uncompiled
from insitu.graph.errors import OptionError
from insitu.graph.location import Location
from insitu.models.loading.source import Source
from insitu.models.loading.tasks import no_language_model
from insitu.models.tokens import reads_tokens


class Opened(NamedTuple):
    """What a model is made of.

    Attributes:
        module: the module, with weights or without.
        config: its config.
        source: where it comes from; None for a module that was in memory.
        loaded: whether its weights are in memory.
    """

    module: nn.Module
    config: Any
    source: Source | None = None
    loaded: bool = True


def check_given(model: object, tokenizer: object, location: Location) -> None:
    """Raises if a language model is given as something else, or its tokenizer is.

    Args:
        model: what was given as the model.
        tokenizer: what was given as the tokenizer, None if nothing was.
        location: the user's line.

    Raises:
        OptionError: if it is.
    """
    if hasattr(model, "to_diff_dict"):  # a config of Transformers
        raise OptionError(
            f"A {type(model).__name__} is no model: write "
            "`LanguageModel(AutoModelForCausalLM.from_config(config))`, and before it "
            "`from transformers import AutoModelForCausalLM`. Its weights are random.",
            location,
        )
    if not isinstance(model, str | os.PathLike | nn.Module):
        raise OptionError(
            "A model is given as a repo id, a folder, or a module of Transformers, not as "
            f"{model!r:.80}.",
            location,
        )
    if isinstance(tokenizer, str):
        raise OptionError(
            f"`tokenizer` is a tokenizer, and not {tokenizer!r}: write "
            f"`tokenizer=AutoTokenizer.from_pretrained(...)`, or `device_map=` for a device.",
            location,
        )


def opened_files(source: Source, location: Location) -> Opened:
    """Returns a model in files, without its weights unless it cannot be made without them.

    Args:
        source: where it comes from.
        location: the user's line.
    """
    tree = source.tree()
    module = source.weights(location) if tree is None else tree
    return Opened(module, source.config, source, tree is None)


def opened_language_files(
    name: str,
    kwargs: dict[str, Any],
    choose: Callable[[Any, Location, str], Any],
    location: Location,
    allow_new_weights: bool,
    asked: bool,
) -> tuple[Opened, Source]:
    """Returns a language model in files, and where it comes from.

    Args:
        name: as of `Source`, like all that follows.
        kwargs: keyword arguments for `from_pretrained`.
        choose: gives the class to load it with.
        location: the user's line.
        allow_new_weights: whether weights that no file has may be drawn at random.
        asked: whether the user chose the class.

    Raises:
        LoadError: if there is no such model.
        OptionError: if it is no language model.
    """
    source = Source(name, kwargs, choose, location, allow_new_weights, asked)
    opened = opened_files(source, location)
    if not reads_tokens(uncompiled(opened.module)):
        raise OptionError(no_language_model(source.config), location)
    return opened, source


def opened_language_module(module: nn.Module, kwargs: dict[str, Any], location: Location) -> Opened:
    """Returns a language model in memory.

    Args:
        module: the model.
        kwargs: what was given to load a model with.
        location: the user's line.

    Raises:
        OptionError: if anything was, or if it is no language model of Transformers.
    """
    if kwargs:
        raise OptionError(
            f"{', '.join(map(repr, kwargs))} would be used to load a model, but the model is "
            "in memory already.",
            location,
        )
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        raise OptionError(
            f"{type(module).__name__} is no Transformers model: wrap it as `Model(module)`.",
            location,
        )
    inner = uncompiled(module)
    if not reads_tokens(inner):
        raise OptionError(
            f"{type(inner).__name__} is no language model, because it takes no "
            "`input_ids` or has no one embedding for them: wrap it as `Model(module)`.",
            location,
        )
    return Opened(module, config)
