"""Why a value is not in a cache, and the line that keeps it: the message of an error."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from insitu.graph.errors import InsituError, nearest
from insitu.models.keys import HOOK_PLACES, entry_of, spelled
from insitu.models.spellings import meant
from insitu.models.transformer_lens import OF_MODEL, TransformerLens
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Missing


def why_lacking(
    key: str,
    name: str | None,
    there: Sequence[str],
    aliases: Mapping[str, tuple[str, bool]],
    layers: int,
    hooks: TransformerLens | None,
) -> str:
    """Returns why a value is not in a cache, in a sentence or two.

    Args:
        key: the key that was asked for.
        name: the name in a block that it was asked by; None if by the key itself.
        there: the keys that are in the cache, and their other names.
        aliases: the other names of keys, of the model.
        layers: how many blocks the model has.
        hooks: the model's names; None if the model is gone.
    """
    asked = name or key
    number = re.match(r"(?:encoder_)?blocks\.(\d+)\.", key)
    if number is not None and key.startswith("blocks.") and int(number[1]) >= layers:
        return f"There is no block {number[1]}: the model has {layers}, 0 to {layers - 1}."
    words = dict.fromkeys(one.rpartition(".")[2].removeprefix("hook_") for one in there)
    if name is not None:
        block, layer, *_ = key.split(".")
        if f"{block}.{layer}.attn.hook_{name}" in there:  # of the same last word, and another value
            return (
                f"{asked!r} is not in the cache: write `cache[{name!r}, {layer}, 'attn']` for "
                "TransformerLens's, which is another value on this model."
            )
        other = next((one for one in meant(name) if one.rpartition(".")[2] in words), None)
        if other is not None:
            return f"{asked!r} is not in the cache: write {other!r}."
    if hooks is not None:
        with contextlib.suppress(InsituError), hooks.vocabulary.quiet():
            found = _kept_by(key, name, aliases, hooks)
            if found:
                return f"{asked!r} is not in the cache: {found}"
    if key in aliases:
        return f"{asked!r} is not in the cache (it is {aliases[key][0]!r})."
    near = nearest(key, there) if name is None else nearest(name, words)
    return f"{asked!r} is not in the cache{near}."


def _kept_by(
    key: str, name: str | None, aliases: Mapping[str, tuple[str, bool]], hooks: TransformerLens
) -> str:
    """The line that keeps it, or why the model does not have it; "" if nothing has such a name."""
    missing = ""
    for one in _candidates(key, name):
        entry = entry_of(hooks.vocabulary, one) or hooks.entry(one)
        if isinstance(entry, Named):
            kept = one if hooks.standard(one) is None else aliases.get(one, (one,))[0]
            named = f"write `model.run_with_cache(prompt, {_of_all_blocks(kept)})`."
            return named if kept == one else f"it is {kept!r}. To keep it, {named}"
        if isinstance(entry, Missing):
            missing = missing or f"the model has no `{one}`, since {entry.reason}"
    return missing


def _candidates(key: str, name: str | None) -> Iterator[str]:
    """The names that may be meant."""
    yield key
    if f"hook_{key}" in OF_MODEL:
        yield f"hook_{key}"
    if name is not None:
        block = ".".join(key.split(".")[:2])
        yield from (f"{block}.{place}{name}" for place in HOOK_PLACES)
        yield from (f"{block}.{spelled(one) or one}" for one in meant(name))


def _of_all_blocks(key: str) -> str:
    """What `names` says to keep a value of each block."""
    stack, _, rest = key.partition(".")
    if stack not in ("blocks", "encoder_blocks"):
        return f'"{key}"'
    rest = rest.partition(".")[2]
    return f'"{rest}"' if spelled(rest) == rest and stack == "blocks" else f'"*.{rest}"'
