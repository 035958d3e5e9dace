"""Proofs that were made before: those that the package ships, and those on this machine's disk.

A proof holds for a class, for its config without sizes, and for the versions that it was made
with. Files are read with suspicion: one that is broken, old or strange is as if it were not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from insitu.models.architectures import Description
from insitu.models.attention import OPTION, SETTING
from insitu.models.proof.outcome import Proof
from insitu.models.proof.signature import tree_signature

VARIABLE = "INSITU_PROOFS"
"""The environment variable with the folder of proofs; "off" for none."""

# With these a model may be run, and with nothing else that a file says.
_SHOWING = (OPTION, "eager"), ("output_attentions", True)
_LARGEST_FILE = 1 << 20
_LONGEST_REASON = 2000
_IGNORED = frozenset(
    (
        *("architectures", "dtype", "torch_dtype", "id2label", "label2id", "name_or_path"),
        *("quantization_config", "transformers_version", "problem_type", "task_specific_params"),
        *("_commit_hash", "_name_or_path", "_attn_implementation_autoset", SETTING),
        "_experts_implementation_internal",
    )
)
# Files beside `anatomy/` and `proof/` that decide what is found and proven.
_FINDING = (
    *("body.py", "configuration.py", "parts.py", "samples.py", "visible_softmax.py"),
    *("vocabulary.py", "weights.py"),
)
_IGNORED_ENDINGS = ("token_id", "token_ids", "token_index", "dropout", "_range", "_theta", "pdrop")


def key_of(
    module: nn.Module, modules: Mapping[str, nn.Module], description: Description
) -> str | None:
    """Returns under what name a model's proof is remembered, None if it is not to be.

    Args:
        module: the model.
        modules: its tree, by path.
        description: the description of its blocks.
    """
    kind = type(module)
    source = _source(kind.__module__)
    if source is None or not hasattr(getattr(module, "config", None), "get_text_config"):
        return None
    setting: Any = vars(module.config).get(SETTING)
    traits = [f"{kind.__module__}.{kind.__qualname__}", source, tree_signature(modules)]
    traits.append(repr(description))
    traits += [str(setting), json.dumps(_traits(module.config), sort_keys=True)]
    return hashlib.sha256("\n".join(traits).encode()).hexdigest()[:32]


def recall(key: str) -> Proof | None:
    """Returns what was proven before, None if nothing was.

    Args:
        key: as of `key_of`.
    """
    shipped, own = _shipped(_version("transformers")).get(key), _read(key)
    if shipped is None or own is None:
        return shipped or own
    return merged(shipped, own)


def remember(key: str, proof: Proof) -> None:
    """Writes a proof to the disk, if that can be written to.

    Args:
        key: as of `key_of`.
        proof: the proof.
    """
    folder = _folder()
    if folder is None:
        return
    data = json.dumps({"code": _code(), **as_data(proof)})
    with contextlib.suppress(OSError):  # a home that is read-only, or full
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(data)
            Path(name).replace(folder / f"{key}.json")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def merged(first: Proof, second: Proof) -> Proof:
    """Returns what two proofs say of kinds of blocks; of the model itself, what the first does.

    Args:
        first: a proof.
        second: another one, of the same class.
    """
    blocks = {**second.blocks, **first.blocks}
    return Proof(blocks, first.whole, first.stacks, first.showing)


def as_data(proof: Proof) -> dict[str, Any]:
    """Returns a proof as plain data.

    Args:
        proof: the proof.
    """
    return {
        "blocks": {kind: dict(sorted(why.items())) for kind, why in sorted(proof.blocks.items())},
        "whole": dict(sorted(proof.whole.items())),
        "stacks": dict(proof.stacks),
        "showing": dict(proof.showing),
    }


def from_data(data: Any) -> Proof | None:
    """Returns a proof of plain data, None if that is none.

    Args:
        data: the content of a file, which may be anything.
    """
    if not isinstance(data, dict):
        return None
    found = cast("dict[str, Any]", data)
    blocks, whole, stacks, showing = (
        found.get(name) for name in ("blocks", "whole", "stacks", "showing")
    )
    if not isinstance(blocks, dict) or not all(map(_are_reasons, (*blocks.values(), whole))):
        return None
    if not isinstance(stacks, dict) or not isinstance(showing, dict):
        return None
    if not all(type(number) is int and 0 <= number < 64 for number in stacks.values()):
        return None
    if any((name, value) not in _SHOWING for name, value in showing.items()):
        return None
    return Proof(blocks, cast("Any", whole), stacks, showing)


def _are_reasons(data: Any) -> bool:
    return isinstance(data, dict) and all(
        isinstance(name, str) and isinstance(why, str) and len(why) < _LONGEST_REASON
        for name, why in cast("dict[Any, Any]", data).items()
    )


def _read(key: str) -> Proof | None:
    folder = _folder()
    if folder is None:
        return None
    try:
        with open(folder / f"{key}.json", "rb") as file:
            data = json.loads(file.read(_LARGEST_FILE))
    except (OSError, ValueError, RecursionError):
        return None
    return from_data(data) if isinstance(data, dict) and data.get("code") == _code() else None


def _folder() -> Path | None:
    """Where proofs are kept, None for nowhere."""
    asked = os.environ.get(VARIABLE)
    if asked is not None:
        return None if asked.strip().lower() in ("", "0", "off", "no", "false") else Path(asked)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base) / "insitu" / "proofs"
    try:
        return Path.home() / ".cache" / "insitu" / "proofs"
    except RuntimeError:  # a user without a home
        return None


@cache
def _shipped(version: str) -> Mapping[str, Proof]:
    """The proofs that the package ships for a version of Transformers."""
    place = resources.files("insitu.models.proof") / "shipped" / f"{version}.json"
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    proofs = {key: from_data(one) for key, one in data["proofs"].items()}
    return {key: proof for key, proof in proofs.items() if proof is not None}


@cache
def _code() -> str:
    """What a proof of today depends on: this package's own code, and what it runs on."""
    found = hashlib.sha256(f"{_version('torch')} {_version('transformers')}".encode())
    models = resources.files("insitu.models")
    for folder in (models / "anatomy", models / "proof"):
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                found.update(file.read_bytes())
    for name in _FINDING:
        found.update((models / name).read_bytes())
    return found.hexdigest()[:16]


@cache
def _source(name: str) -> str | None:
    """A digest of a Python module's source; "" of one that comes with Transformers."""
    if name.partition(".")[0] == "transformers":
        return ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return None
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return None


@cache
def _version(package: str) -> str:
    from importlib.metadata import version

    return torch.__version__ if package == "torch" else version(package)


def _traits(value: Any) -> Any:
    """A config without sizes: numbers are nothing, one or many."""
    if hasattr(value, "get_text_config"):
        return {
            name: _traits(part)
            for name, part in vars(value).items()
            if name not in _IGNORED and not name.endswith(_IGNORED_ENDINGS)
        }
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return (
            "negative" if value < 0 else "none" if value == 0 else "one" if value == 1 else "many"
        )
    if isinstance(value, float):
        return "0.0" if value == 0.0 else "1.0" if value == 1.0 else "x"
    if isinstance(value, Mapping):
        table = cast("Mapping[Any, Any]", value)
        return {str(name): _traits(part) for name, part in table.items()}
    if isinstance(value, list | tuple | set | frozenset):
        parts = cast("list[Any]", value)
        return sorted({json.dumps(_traits(part), sort_keys=True) for part in parts})
    return type(value).__qualname__
