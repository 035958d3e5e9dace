"""What a job says of a model: its name and revision, its edits, and its fingerprint."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

from torch import nn

from insitu.engine.fingerprint import (
    Fingerprint,
    dtypes_of,
    order_of,
    pattern_of,
    shortened,
    tree_of,
)
from insitu.engine.job_parts import JobModel
from insitu.graph import wire
from insitu.graph.errors import WireError
from insitu.graph.node import Graph

# Settings of a config that change nothing in what a forward computes. Its dtype, its quantisation
# and its weights are looked at in the module itself.
_IGNORED = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "id2label", "label2id", "name_or_path"),
        *("quantization_config", "transformers_version", "problem_type", "task_specific_params"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("tokenizer_class", "finetuning_task", "auto_map", "pruned_heads"),
    )
)
_IGNORED_ENDINGS = ("dropout", "initializer_range", "pdrop")
_TOKEN_IDS = ("token_id", "token_ids")


class Described(Protocol):
    """A model, as far as a job says something of it."""

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        ...

    @property
    def without_data(self) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """A module of the same structure that is not quantised, and its tree."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    @property
    def away(self) -> object:
        """Where its blocks are run, None for here."""
        ...

    @property
    def knows_dtypes(self) -> bool:
        """Whether the dtypes of its weights are certain."""
        ...

    @property
    def edits(self) -> Sequence[Graph]:
        """What holds in every run."""
        ...


class Structure(NamedTuple):
    """What of a fingerprint is the same until the model's tree or its weights are others.

    Attributes:
        kind: as of `Fingerprint`, and so are the others.
        tree: as of `Fingerprint`.
        order: as of `Fingerprint`.
        dtypes: as of `Fingerprint`.
    """

    kind: str
    tree: Mapping[str, str]
    order: str
    dtypes: Sequence[str]


def structure_of(model: Described) -> Structure:
    """Returns the structure of a model, loaded or not; of a quantised one that it was made of.

    Args:
        model: the model.
    """
    module, modules = model.without_data
    dtypes = dtypes_of(model.module) if model.knows_dtypes else []
    return Structure(type(module).__qualname__, tree_of(modules), order_of(modules), dtypes)


def described(model: Described, origin: tuple[str, str], structure: Structure) -> JobModel:
    """Returns what a job says of the model that it is for.

    Args:
        model: the model, loaded or not.
        origin: the name that it was loaded by, and the revision that was asked for; "" if none.
        structure: its structure.
    """
    config = getattr(model.module, "config", None)
    config = config if hasattr(config, "get_text_config") else None
    name, revision = origin
    settings = dict(_settings_of_parts(model) if config is None else _settings(config, ""))
    ids = {name: settings.pop(name) for name in [*settings] if name.endswith(_TOKEN_IDS)}
    return JobModel(
        _public(name or getattr(config, "name_or_path", None) or ""),
        getattr(config, "_commit_hash", None) or revision,
        [_digest(edit) for edit in model.edits],
        Fingerprint(
            structure.kind,
            settings,
            structure.tree,
            structure.order,
            structure.dtypes,
            _vocabulary_digest(vars(model).get("_tokenizer")),
            ids,
            _generation(model),
        ),
    )


def _generation(model: Described) -> Mapping[str, Any] | None:
    """What generations take unless told, and is not Transformers' own default."""
    config = getattr(model.module, "generation_config", None)
    # It is read with the weights, or comes from the server that has these.
    if config is None or not (model.loaded or model.away is not None):
        return None
    # Not `to_diff_dict`, which copies it as deep as it goes: each job is compared with this.
    usual = _usual_generation()
    own = {
        name: value
        for name, value in vars(config).items()
        if name not in usual or value != usual[name]
    }
    return dict(_settings(own, ""))


@cache
def _usual_generation() -> Mapping[str, Any]:
    from transformers import GenerationConfig  # of use only where it is loaded already

    return vars(GenerationConfig())


def _public(name: str) -> str:
    """A repo id as it is; of a folder its last part, since the rest tells who the user is."""
    path = str(name)
    if os.path.isabs(path) or os.path.exists(path) or path.startswith("."):
        return os.path.basename(os.path.normpath(path))
    return path[:200]


def _settings(config: Any, prefix: str) -> Iterator[tuple[str, bool | int | float | str | None]]:
    """The settings in a config and in the configs of its parts, by name: plain values, or texts."""
    entries = config if isinstance(config, Mapping) else vars(config)
    for name, value in cast("Mapping[Any, Any]", entries).items():
        name = str(name)
        if name.startswith("_") or name in _IGNORED or name.endswith(_IGNORED_ENDINGS):
            continue
        if hasattr(value, "get_text_config") or isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, _PLAIN):
            yield f"{prefix}{name}", _plain(value)


_PLAIN = bool | int | float | str | list | tuple  # pyright: ignore[reportMissingTypeArgument]


def _plain(value: Any) -> bool | int | float | str | None:
    """A setting as a job holds it: as it is, or as a text if it is no one finite number."""
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if value is None or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    listed = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
    # A lone surrogate is in a string that came from JSON, and no message can hold it.
    return shortened(str(listed).encode(errors="replace").decode())


def _settings_of_parts(model: Described) -> Mapping[str, bool | int | float | str | None]:
    """The settings of PyTorch's own modules in a model without a config, such as a slope.

    What attributes of other classes mean is not known: some count how often they were called.
    """
    found: dict[str, list[Any]] = {}
    for path, module in model.without_data[1].items():
        if not type(module).__module__.startswith("torch.nn."):
            continue
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in _OF_TRAINING and isinstance(value, _PLAIN):
                place = f"{pattern_of(path)}.{name}".removeprefix(".")
                found.setdefault(place, []).append(_plain(value))
    return {
        name: values[0] if len(set(values)) == 1 else shortened(str(values))
        for name, values in found.items()
        if not name.endswith(_IGNORED_ENDINGS)
    }


_OF_TRAINING = ("training", "momentum", "p", "inplace")
"""Settings of PyTorch's modules that change nothing in what they compute in evaluation."""


def _digest(edit: Graph) -> str:
    """A digest of an edit. One that holds something that is no data is like no other."""
    try:
        data = wire.to_bytes(edit)
    except WireError:
        data = f"live {id(edit)}".encode()
    return hashlib.sha256(data).hexdigest()


_DIGESTS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
"""The digests of tokenizers' vocabularies, with how many tokens those had."""


def _vocabulary_digest(tokenizer: Any) -> str:
    """A digest of the meanings of token ids; "" if there is no tokenizer."""
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "__len__")):
        return ""  # any function from texts to ids can be a tokenizer
    count = len(tokenizer)
    try:
        known = _DIGESTS.get(tokenizer)
    except TypeError:  # a class of the user's that is no key of a dictionary
        return _digest_of_vocabulary(tokenizer)
    if known is None or known[0] != count:
        known = _DIGESTS[tokenizer] = count, _digest_of_vocabulary(tokenizer)
    return known[1]


def _digest_of_vocabulary(tokenizer: Any) -> str:
    try:
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    except NotImplementedError:  # Transformers' base class has the method, and some classes do not
        return ""
    entries = sorted(vocabulary.items(), key=lambda entry: (entry[1], entry[0]))
    text = "\n".join(f"{number} {token}" for token, number in entries)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
