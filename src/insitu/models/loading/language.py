"""What a language model is made of, wherever it is: in memory, in files, or on a server."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from insitu.graph.location import Location
from insitu.models.loading.opened import (
    Opened,
    check_given,
    opened_language_files,
    opened_language_module,
)
from insitu.models.loading.tasks import language_class


class Given(NamedTuple):
    """What a language model is to be made of: fields as of `LanguageModel`."""

    model: Any
    tokenizer: Any
    task: str | None
    allow_new_weights: bool
    remote: Any
    kwargs: dict[str, Any]


def opened_language_model(given: Given, location: Location) -> tuple[Opened, Any, Any]:
    """Returns a language model, its tokenizer, and where its blocks are run, None for here.

    Args:
        given: what was given.
        location: the user's line.

    Raises:
        LoadError: if there is no such model.
        OptionError: if it is no language model, or an option has no meaning.
    """
    model, tokenizer, task, allow_new_weights, remote, kwargs = given
    check_given("" if model is None and remote is not None else model, tokenizer, location)
    asked = dict(kwargs) if task is None else {"task": task, **kwargs}
    if allow_new_weights:
        asked["allow_new_weights"] = True
    if remote is not None:
        from insitu.models.loading.served import opened_on_server  # of use only with a server

        opened, found, away = opened_on_server(model, remote, asked, location)
        return opened, found if tokenizer is None else tokenizer, away
    if isinstance(model, nn.Module):
        return opened_language_module(model, asked, location), tokenizer, None
    assert model is not None  # else `check_given` has raised
    choose = partial(language_class, asked=task)
    opened, source = opened_language_files(
        os.fspath(model), kwargs, choose, location, allow_new_weights, task is not None
    )
    return opened, source.tokenizer() if tokenizer is None else tokenizer, None
