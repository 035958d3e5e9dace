"""The whole numbers in a config: sizes, and lengths from which on a model computes otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def config_sizes(config: Any) -> frozenset[int]:
    """Returns all whole numbers of a config, of those in it too.

    Args:
        config: a config of Transformers.
    """
    found: set[int] = set()
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, float) and value.is_integer():
            found.add(int(value))
        elif isinstance(value, Mapping):
            waiting.extend(cast("Mapping[Any, Any]", value).values())
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(cast("list[Any]", value))
        elif hasattr(value, "get_text_config"):
            waiting.append(vars(value))
    return frozenset(found)
