"""Keys: standard names with the place that they have in a model, as in `blocks.3.attention.z`.

A key is what one writes behind `model.`, with the number of a block between dots. Here is which
keys there can be, and what each stands for; which of them a model has its vocabulary knows.
"""

from __future__ import annotations

from collections.abc import Iterator

from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Role, Roles, Vocabulary

OF_BLOCK = (
    *("residual_in", "norm_1.output"),
    *(f"attention.{name}" for name in ("q", "k", "v", "scores", "pattern", "z", "result")),
    *("attention_out", "mixer_out"),
    *(f"cross_attention.{name}" for name in ("q", "k", "v", "scores", "pattern", "z", "result")),
    *("cross_attention_out", "residual_mid", "norm_2.output", "mlp.pre", "mlp.post"),
    *("experts.router", "experts.weights", "mlp_out", "extra_out", "residual_out", "block_out"),
)
"""The keys of a block's values, in the order in which most blocks compute them."""

COMPUTED = ("attention.result", "cross_attention.result")
"""Those of values that no model computes itself, and that are large."""

HOOK_PLACES = ("", "hook_", "attn.hook_", "mlp.hook_")
"""Where TransformerLens's short names of a block's values stand in it."""

_STACKS = ("encoder_blocks", "blocks")


def keys(vocabulary: Vocabulary) -> Iterator[str]:
    """Gives all keys that there can be in a model, in the order of their values.

    Args:
        vocabulary: the model's standard names.
    """
    yield "embedding.output"
    for stack in _STACKS:
        for layer in range(layers(vocabulary, stack)):
            for name in OF_BLOCK:
                yield f"{stack}.{layer}.{name}"
    yield "final_norm.output"
    yield "logits"


def doubles(vocabulary: Vocabulary) -> dict[str, str]:
    """Returns the keys of values that have another key too, and that key.

    `block_out` is `residual_out` where there is one: a cache needs no two copies of it.

    Args:
        vocabulary: the model's standard names.
    """
    found: dict[str, str] = {}
    for stack in _STACKS:
        for layer in range(layers(vocabulary, stack)):
            first, second = (f"{stack}.{layer}.{name}" for name in ("residual_out", "block_out"))
            if all(isinstance(entry_of(vocabulary, key), Named) for key in (first, second)):
                found[second] = first
    return found


def layers(vocabulary: Vocabulary, stack: str = "blocks") -> int:
    """Returns how many blocks a model has.

    Args:
        vocabulary: the model's standard names.
        stack: the name of the stack.
    """
    blocks = vocabulary.entry("", "", stack)
    return len(blocks.paths) if isinstance(blocks, Roles) else 0


def entry_of(vocabulary: Vocabulary, key: str) -> Entry | None:
    """Returns what a key stands for in a model, None if there is no such key.

    Args:
        vocabulary: the model's standard names.
        key: the key.
    """
    path = part = ""
    names = key.split(".")
    while names:
        entry = vocabulary.entry(path, part, names.pop(0))
        if isinstance(entry, Roles):
            number = names.pop(0) if names else ""
            if not number.isdecimal() or int(number) >= len(entry.paths):
                return None
            path = entry.paths[int(number)]
        elif isinstance(entry, Role):
            path, part = entry.path, entry.part
            if names == ["output"] and entry.is_module and not entry.part:
                return Named(path, "output")
        else:
            return None if names and isinstance(entry, Named) else entry
    return None


def spelled(name: str) -> str | None:
    """Returns the key in a block that is meant by its last word, None if there is none.

    Args:
        name: such as "z" for "attention.z", or the whole key.
    """
    if name in OF_BLOCK:
        return name
    return next((key for key in OF_BLOCK if key.rpartition(".")[2] == name != "output"), None)
