"""What the user gives that a forward fills: caches of keys and values, lists and dictionaries.

They are inputs like any other. Each pass works on a copy, so that no prompt sees what another has
appended, and what the user holds stays as it is. The mask and the positions of a prompt that goes
on from a cache are in `continued_prompts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch

from insitu.graph.objects import map_objects
from insitu.graph.recorded import AnyRecorded
from insitu.graph.structure import CONSTANTS, independent, map_structure, tensors_of
from insitu.models.blocks import CACHES

PAST = "past_key_values"
"""What Transformers calls the cache that a forward goes on from."""

_NAMES = (PAST, "cache_params")


def is_cache(value: Any) -> bool:
    """Returns whether an argument is a cache of Transformers.

    Args:
        value: the argument.
    """
    # Some families have caches of their own beside their models.
    return any(
        base.__module__ in CACHES
        or (base.__module__.startswith("transformers.") and base.__name__.endswith("Cache"))
        for base in cast(Any, type)(value).__mro__
    )


def goes_on_from(name: str, value: Any) -> bool:
    """Returns whether an argument is what a prompt goes on from, so that each may have its own.

    Args:
        name: its name.
        value: the argument. Older versions of Transformers take tuples of tensors too.
    """
    if value is None or type(value) in CONSTANTS:
        return False
    return name in _NAMES or is_cache(value)


def taken_out(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the caches out of the options of a block, as they are now, for each of its prompts.

    Args:
        options: the options, which are changed.
    """
    names = [name for name, value in options.items() if goes_on_from(name, value)]
    return {name: kept_as_now(options.pop(name)) for name in names}


def kept_as_now(value: Any) -> Any:
    """Returns a cache as it is now. The user may go on to fill it before the block runs.

    Args:
        value: the cache, or a saved one.
    """
    cache = _content(value)
    # Most caches grow by new tensors. One of a fixed size is written in place.
    in_place = getattr(cache, "is_compileable", True) or not is_cache(cache)
    return map_objects(independent if in_place else _same, cache)


def own_copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of one pass, with copies of all that the model may fill.

    These are caches, lists and dictionaries, with the tensors in them. Single tensors and objects
    of other classes are as they were given.

    Args:
        arguments: the arguments by name.
    """
    return {name: own_copy(value) for name, value in arguments.items()}


def own_copy(value: Any) -> Any:
    """Returns an argument of one pass: as of `own_copies`.

    Args:
        value: the argument.
    """
    if isinstance(value, torch.Tensor) or type(value) in CONSTANTS:
        return value
    return map_structure(_copied, value)


def cached_length(value: Any) -> int:
    """Returns how many positions a cache holds, 0 if it does not say so.

    Args:
        value: the cache, None if there is none.
    """
    cache = _content(value)
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length() or 0)
    keys = tensors_of(cache)[:1] if isinstance(cache, tuple) else []
    return keys[0].shape[-2] if keys and keys[0].ndim == 4 else 0


def is_unfilled(cache: Any) -> bool:
    """Returns whether no forward has filled a cache, as far as it says so.

    Args:
        cache: the cache, None if there is none.
    """
    layers = getattr(cache, "layers", None)
    if not is_cache(cache) or layers is None:
        return False
    return not any(getattr(layer, "is_initialized", True) for layer in layers)


def _content(value: Any) -> Any:
    """What was saved, of a saved value."""
    return cast(Any, value).result() if isinstance(value, AnyRecorded) else value


def _copied(item: Any) -> Any:
    if isinstance(item, torch.Tensor):
        return independent(item)
    return map_objects(independent, item) if is_cache(item) else item


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
