"""What the config of a Transformers model says, where any part of it may be missing.

Which attributes a config has depends on its class, on the version of Transformers and on the
file that it was read from. The rest of the package reads attributes that it needs with `said`,
and the config of the text with `text_config`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_k",
    "moe_top_k",
)


def said(config: Any, *names: str, default: Any = None) -> Any:
    """Returns the first attribute that a config has and that is not None.

    Args:
        config: a config, a generation config, or None.
        names: the attributes, the preferred ones first.
        default: the value to return if it has none of them.
    """
    for name in names:
        # A config that computes an attribute from others may lack those.
        try:
            value = getattr(config, name, None)
        except Exception:
            continue
        if value is not None:
            return value
    return default


def all_said(config: Any, *names: str) -> list[Any]:
    """Returns what a config has under some names, where it may say so of each layer alone.

    Newer configs refuse an attribute that differs from layer to layer, such as `head_dim`.

    Args:
        config: as of `said`.
        names: the attributes.
    """
    found: list[Any] = []
    for name in names:
        try:
            found.append(getattr(config, name, None))
        except Exception:
            layers: Any = said(config, "per_layer_config", default=())
            of_layers = layers.values() if isinstance(layers, Mapping) else layers
            found += [said(layer, name) for layer in of_layers]
    return [value for value in found if value is not None]


def text_config(config: Any) -> Any:
    """Returns the part of a config that is about text, which may be the config itself.

    Args:
        config: the config of a model.
    """
    try:
        return config.get_text_config()
    except Exception:  # there are several such parts, or one that it names is missing
        return config


def first_id(*given: Any) -> int | None:
    """Returns the first token id among what configs say, None if there is none.

    Args:
        given: ids, lists of ids, or what a config has in their place, such as None.
    """
    for each in given:
        found = each[0] if isinstance(each, list | tuple) and each else each
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None


def expert_counts(config: Any) -> tuple[int, int]:
    """Returns how many experts there are, and how many of them a token passes, 0 if none.

    Args:
        config: the config of a model.
    """
    text = text_config(config)

    # Some keep what they say of their MLPs in a config of its own.
    parts = [text, *(part for part in vars(text).values() if hasattr(part, "get_text_config"))]

    def number(names: Sequence[str]) -> int:
        counts = [count for part in parts for count in all_said(part, *names)]
        return next((count for count in counts if isinstance(count, int)), 0)

    return number(_EXPERTS), number(_CHOSEN)


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
