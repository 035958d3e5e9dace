"""What a job says of a model: its name and revision, its edits, and its fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast
from weakref import WeakKeyDictionary

from torch import nn

from insitu.graph import wire
from insitu.graph.errors import WireError
from insitu.graph.node import Graph
from insitu.runtime.fingerprint import Fingerprint, dtypes_of, shortened, tree_of
from insitu.runtime.job_parts import JobModel

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
_IGNORED_ENDINGS = ("token_id", "token_ids", "dropout", "initializer_range", "pdrop")


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
        tree: likewise.
        dtypes: likewise.
    """

    kind: str
    tree: Mapping[str, str]
    dtypes: Sequence[str]


def structure_of(model: Described) -> Structure:
    """Returns the structure of a model, loaded or not; of a quantised one that it was made of.

    Args:
        model: the model.
    """
    module, modules = model.without_data
    dtypes = dtypes_of(model.module) if model.knows_dtypes else []
    return Structure(type(module).__qualname__, tree_of(modules), dtypes)


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
    return JobModel(
        _public(name or getattr(config, "name_or_path", None) or ""),
        getattr(config, "_commit_hash", None) or revision,
        [_digest(edit) for edit in model.edits],
        Fingerprint(
            structure.kind,
            {} if config is None else dict(_settings(config, "")),
            structure.tree,
            structure.dtypes,
            _vocabulary_digest(vars(model).get("_tokenizer")),
        ),
    )


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
        elif value is None or isinstance(value, bool | float | int):
            yield f"{prefix}{name}", value
        elif isinstance(value, str | list | tuple):
            listed = list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
            yield f"{prefix}{name}", shortened(str(listed))


def _digest(edit: Graph) -> str:
    """A digest of an edit. One that holds what is no data is like no other."""
    try:
        data = wire.to_bytes(edit)
    except WireError:
        data = f"live {id(edit)}".encode()
    return hashlib.sha256(data).hexdigest()


_DIGESTS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()
"""The digests of tokenizers' vocabularies, with how many tokens those had."""


def _vocabulary_digest(tokenizer: Any) -> str:
    """A digest of which token ids mean what; "" if there is no tokenizer."""
    if tokenizer is None or isinstance(tokenizer, Exception):
        return ""
    try:
        count = len(tokenizer)
        known = _DIGESTS.get(tokenizer)
        if known is None or known[0] != count:
            entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
            text = "\n".join(f"{number} {token}" for token, number in entries)
            known = count, hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
            _DIGESTS[tokenizer] = known
        return known[1]
    except (AttributeError, TypeError, NotImplementedError):  # what a user gave need not have one
        return ""
