"""Which implementation of attention a model runs with, changed for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from insitu.graph.changes import changing

OPTION = "attn_implementation"
"""The option of a run, beside the forward's own, that says with which implementation."""

SETTING = "_attn_implementation_internal"
"""Where a config has the implementation that it is set to."""


@contextmanager
def attending(module: nn.Module, implementation: str | None) -> Generator[None, None, None]:
    """Lets a Transformers model run with an implementation of attention; None for its own.

    Its configs are changed for the duration, by hand: the model's own method refuses to leave
    one that it would not be loaded with.

    Args:
        module: the model.
        implementation: such as "eager".
    """
    with changing() as changes:
        if implementation is not None:
            for settings in _configs(module):
                changes.put(settings, SETTING, implementation)
        yield


def implementations(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a model's attention is set to, in all of its parts."""
    return tuple(settings[SETTING] for settings in _configs(module))


def _configs(module: nn.Module) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for part in module.modules():
        config = vars(part).get("config")
        if hasattr(config, "__dict__") and SETTING in vars(config):
            found[id(config)] = vars(config)
    return list(found.values())
