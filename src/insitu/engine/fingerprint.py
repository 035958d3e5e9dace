"""What a model is like, without its weights: what a job compares with the model that runs it.

A job refers to modules by path and was made for shapes, so it is for one structure. Other weights
in the same structure are another model all the same, and are reported.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
import torch
from torch import nn

from insitu.graph.wire_message import printable

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_LONGEST = 200  # characters of what is under one path
_SHOWN = 3  # differences that a message names


Text = Annotated[str, msgspec.Meta(max_length=4096)]
"""What a job says of a model."""

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 digest, in hexadecimal digits."""

_Settings = Mapping[Text, bool | int | float | Text | None]


class Fingerprint(msgspec.Struct, array_like=True, forbid_unknown_fields=True, frozen=True):
    """What a model is like, in the form in which it travels.

    Attributes:
        kind: the name of its class.
        settings: the numbers and words of its config on which its values depend, by name; without
            a config, those of PyTorch's own modules in it.
        tree: its modules: what there is under each path, with `#` in the place of numbers, such as
            "12 Conv1D, weight 768x2304, bias 2304" under "transformer.h.#.attn.c_attn".
        order: a digest of what there is under each path with its numbers: of the order of layers.
        dtypes: the dtypes of its parameters; none if they are known only with the weights.
        tokens: a digest of its tokenizer's vocabulary, "" if it has none.
        token_ids: which tokens its config says are for padding, for the end of a text and so on.
        generation: what its generations take unless told, as far as it is not Transformers'
            default; None if it generates nothing, or this is known only with the weights.
    """

    kind: Text
    settings: _Settings
    tree: Mapping[Text, Text]
    order: Digest
    dtypes: Sequence[Text]
    tokens: Text
    token_ids: _Settings
    generation: _Settings | None


def tree_of(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the tree of a model as a fingerprint keeps it.

    Args:
        modules: all its modules by path, with weights or without.
    """
    found: dict[str, Counter[str]] = {}
    for path, module in modules.items():
        found.setdefault(pattern_of(path), Counter())[_described(module)] += 1
    return {
        pattern: shortened("; ".join(f"{count} {what}" for what, count in counts.items()))
        for pattern, counts in found.items()
    }


def order_of(modules: Mapping[str, nn.Module]) -> str:
    """Returns a digest of the modules and of the path of each.

    Args:
        modules: all its modules by path, with weights or without.
    """
    lines = sorted(f"{path} {_described(module)}" for path, module in modules.items())
    return _digest("\n".join(lines))


def pattern_of(path: str) -> str:
    """Returns the path of a module with `#` in the place of numbers.

    Args:
        path: the path.
    """
    return _NUMBER.sub(".#", f".{path}").removeprefix(".")


def _described(module: nn.Module) -> str:
    """The class of a module, and the sizes of what its own weights are."""
    sizes: list[str] = []
    for name, tensor in module.named_parameters(recurse=False):
        lazy = nn.parameter.is_lazy(tensor)
        sizes.append(f", {name} {'?' if lazy else _size(tensor)}")
    return type(module).__qualname__ + "".join(sizes)


def _size(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "1"


def shortened(text: str) -> str:
    """Returns a text, or its beginning with a digest of the whole if it is long."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... {_digest(text)[:16]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def dtypes_of(module: nn.Module) -> list[str]:
    """Returns the dtypes of a model's parameters.

    Args:
        module: the model.
    """
    return sorted({str(one.dtype).removeprefix("torch.") for one in module.parameters()})


def other_structure(wanted: Fingerprint, there: Fingerprint) -> list[str]:
    """Returns what of a model's structure is not as a job needs it; the first few differences.

    Args:
        wanted: of the model that the job was made for.
        there: of the model that is to run it.
    """
    found: list[str] = []
    if wanted.kind != there.kind:
        found.append(f"its class is {there.kind}, and not {_shown(wanted.kind)}")
    # A setting that one version of Transformers has and another does not is no difference.
    shared = [name for name in wanted.settings if name in there.settings]
    found += [
        f"its `{name}` is {there.settings[name]!r:.80}, and not {wanted.settings[name]!r:.80}"
        for name in shared
        if there.settings[name] != wanted.settings[name]
    ]
    if len(found) < _SHOWN:
        found += _other_modules(wanted.tree, there.tree)
    if not found and wanted.order != there.order:
        found.append("its modules are of the same kinds, and in another order")
    if wanted.tokens and there.tokens and wanted.tokens != there.tokens:
        found.append("its tokenizer has another vocabulary, so the token ids mean other texts")
    return found[:_SHOWN] + [f"and {len(found) - _SHOWN} more"] * (len(found) > _SHOWN)


def _other_modules(wanted: Mapping[str, str], there: Mapping[str, str]) -> Iterable[str]:
    for path in dict.fromkeys([*wanted, *there]):
        name = f"{path!r:.{_LONGEST}}" if path else "the model itself"
        if path not in there:
            yield f"it has no module {name} ({_shown(wanted[path])})"
        elif path not in wanted:
            yield f"it has a module {name} too ({there[path]})"
        elif wanted[path] != there[path]:
            yield f"{name} is {there[path]}, and not {_shown(wanted[path])}"


def _shown(received: str) -> str:
    """A text of a job, which anybody may have written, as it is printed."""
    return shortened(printable(received))


def other_weights(wanted: Fingerprint, there: Fingerprint) -> list[str]:
    """Returns what tells that a model's weights are not those of a job's model.

    Args:
        wanted: of the model that the job was made for.
        there: of the model that is to run it.
    """
    if not wanted.dtypes or not there.dtypes or wanted.dtypes == there.dtypes:
        return []
    now, then = (" and ".join(dtypes) for dtypes in (there.dtypes, wanted.dtypes))
    return [f"its weights are {now}, and not {_shown(then)}"]


def other_habits(
    wanted: Fingerprint, there: Fingerprint, given: Collection[str] | None
) -> list[str]:
    """Returns which tokens with a meaning, and which defaults of generations, are others.

    Args:
        wanted: of the model that the job was made for.
        there: of the model that is to run it.
        given: the options that all generations of the job are given; None if it has none.
    """
    ids = [name for name in wanted.token_ids if name in there.token_ids]
    pairs = [(name, there.token_ids[name], wanted.token_ids[name]) for name in ids]
    if given is not None and wanted.generation is not None and there.generation is not None:
        now, then = there.generation, wanted.generation
        names = [name for name in dict.fromkeys([*now, *then]) if name not in given]
        pairs += [(f"generation_config.{n}", now.get(n), then.get(n)) for n in names]
    return [
        f"its `{name:.80}` is {now!r:.80}, and not {then!r:.80}"
        for name, now, then in pairs
        if now != then
    ]
