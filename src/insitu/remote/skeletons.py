"""From a server's model to files on a client's disk from which a model without weights is made.

A client trusts a server as little as a server trusts a client. Files have names of a list, and
their content is JSON, text or a tokenizer's own format. A setting that could name code, another
repository or a file of the client's is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
from torch import nn

from insitu import disk
from insitu.engine.job_parts import JobModel
from insitu.graph.errors import InsituError, LoadError, OptionError, SaveError
from insitu.graph.location import here
from insitu.remote.cache_folder import cache_folder, made_private
from insitu.remote.protocol import Skeleton

FILES = frozenset(
    (
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
        *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
        *("sentencepiece.bpe.model", "source.spm", "target.spm", "normalizer.json"),
    )
)
"""The names of files that a skeleton may have."""

MOST_BYTES = 256 * 2**20
"""How many bytes a skeleton may have."""

_SETTINGS = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    "special_tokens_map.json",  # Transformers takes what is in it for settings of the tokenizer
)
_MOST_SETTINGS = 8 * 2**20
_MOST_DEPTH = 20
_LEFT_OUT = frozenset(
    (
        *("auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "init_inputs"),
        *("name_or_path", "cache_dir", "token", "use_auth_token", "local_files_only", "is_local"),
        *("use_kernels", "kernel_config", "use_pretrained_backbone", "backbone", "commit_hash"),
    )
)
"""Settings that name code, files or repositories, or that are of the server's machine alone."""
_LEFT_OUT_ENDINGS = ("_implementation", "_implementation_internal", "_file", "_files", "_path")
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_COUNTS = re.compile(r"(n|num)_(\w+_)?(layers?|experts|blocks)|(\w+_)?(depth|layers)")
_MOST_PARTS = 10_000
"""How many layers or experts a config may have: all of them are made, if without weights."""
_DIGEST = re.compile("[0-9a-f]{64}")


class Described(Protocol):
    """A language model, as far as a skeleton is made of it: `LanguageModel` is one."""

    @property
    def module(self) -> nn.Module:
        """The wrapped module."""
        ...

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        ...

    @property
    def described(self) -> JobModel:
        """What a job says of it."""
        ...


def skeleton_of(model: Described, id: str = "") -> Skeleton:
    """Returns what a client needs to make a model like this one, without its weights.

    Args:
        model: a `LanguageModel`, loaded or not.
        id: what it is called on the server; "" for the name that jobs for it have.

    Raises:
        OptionError: if a client cannot make it without running code: its class is none of
            Transformers, or it has an adapter.
    """
    import transformers

    module: Any = model.module
    kind = type(module).__name__
    if not isinstance(getattr(transformers, kind, None), type):
        raise OptionError(
            f"A client cannot make a {kind}, which is no class of Transformers: serve a model of "
            "Transformers, with adapters merged into it.",
            here(),
        )
    dtype = _dtype_of(module)
    config = json.loads(module.config.to_json_string(use_diff=True))
    # The class is the one that there is, whatever the config says that it was saved from.
    config |= {"architectures": [kind], "dtype": dtype}
    files = {"config.json": _encoded(config)}
    generation = _generation_config(model)
    if generation is not None:
        files["generation_config.json"] = generation.to_json_string(use_diff=True).encode()
    files |= _tokenizer_files(vars(model).get("_tokenizer"))
    cleaned = {name: _cleaned(name, files[name]) for name in sorted(files)}
    return Skeleton(id or model.described.name, cleaned, dtype)


def skeleton_folder(skeleton: Skeleton, within: Path | None = None) -> Path:
    """Returns a folder with the files of a skeleton, from which `LanguageModel` makes the model.

    It has the name of their digest. If it is there already and as it has to be, it is used.

    Args:
        skeleton: the skeleton, which may come from anybody.
        within: where the folder is to be; None for the user's cache.

    Raises:
        LoadError: if a file has a name, or a content, that it may not have.
        SaveError: if the files cannot be written.
    """
    files = checked_files(skeleton)
    digest = hashlib.sha256(msgspec.msgpack.encode([*sorted(files.items())])).hexdigest()
    within = _folder() if within is None else within
    folder = within / digest
    if _is_there(folder, files):
        return folder
    try:
        _write_folder(folder, files)
    except OSError as error:
        raise SaveError(f"'{folder}' cannot be written: {error}.", here()) from None
    return folder


def checked_files(skeleton: Skeleton) -> dict[str, bytes]:
    """Returns the files of a skeleton as they are written, without what they may not have.

    Args:
        skeleton: the skeleton, which may come from anybody.

    Raises:
        LoadError: if there is no config, or if a file has a name, a size or a content that it may
            not have.
    """
    if "config.json" not in skeleton.files:
        raise LoadError("The server's model has no config.", here())
    if sum(map(len, skeleton.files.values())) > MOST_BYTES:
        raise LoadError(f"The files of the server's model have over {MOST_BYTES:,} bytes.", here())
    for name in skeleton.files:
        if name not in FILES:
            raise LoadError(
                f"The server's model has a file {name!r:.100}, and there is no such file of a "
                "config or a tokenizer.",
                here(),
            )
    if skeleton.dtype not in _DTYPES:
        raise LoadError(f"The server's model has the dtype {skeleton.dtype!r:.40}.", here())
    files = {name: _cleaned(name, content) for name, content in skeleton.files.items()}
    config = {**json.loads(files["config.json"]), "dtype": skeleton.dtype}
    return {**files, "config.json": _encoded(config), **_known_tokenizer(files)}


def skeleton_to_bytes(skeleton: Skeleton) -> bytes:
    """Returns a skeleton as it travels.

    Args:
        skeleton: the skeleton.
    """
    return msgspec.msgpack.encode(skeleton)


def skeleton_from_bytes(data: bytes) -> Skeleton:
    """Returns the skeleton that `skeleton_to_bytes` made bytes of.

    Args:
        data: the bytes, which may come from anybody.

    Raises:
        ValueError: if they are none.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has {len(data):,} bytes")
    try:
        return msgspec.msgpack.decode(data, type=Skeleton)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def digest_of(data: bytes) -> str:
    """Returns the digest of a skeleton.

    Args:
        data: its bytes.
    """
    return hashlib.sha256(data).hexdigest()


def cached_skeleton(digest: str) -> Skeleton | None:
    """Returns a skeleton that a server has sent before, None if it is not in the cache.

    Args:
        digest: its digest, which may be anything.
    """
    if not _DIGEST.fullmatch(digest):
        return None
    with suppress(InsituError, ValueError):
        data = disk.read(_folder() / f"{digest}.msgpack", MOST_BYTES)
        if digest_of(data) == digest:
            return skeleton_from_bytes(data)
    return None


def keep_skeleton(data: bytes) -> None:
    """Writes a skeleton to the cache, if that can be written to.

    Args:
        data: its bytes.
    """
    with suppress(InsituError):
        disk.write(_folder() / f"{digest_of(data)}.msgpack", data)


def _folder() -> Path:
    """Where skeletons are kept; for a user without a home, as long as this process lives."""
    folder = cache_folder("skeletons")
    if folder is not None:
        with suppress(InsituError):
            return made_private(folder)
    return _folder_of_process()


@cache
def _folder_of_process() -> Path:
    import atexit

    folder = tempfile.mkdtemp(prefix="insitu-skeletons-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder whole or not at all, in the place of one that is not as it has to be."""
    aside = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    new = aside / "new"
    try:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)
        with suppress(FileNotFoundError):
            folder.rename(aside / "old")
        try:
            new.rename(folder)
        except OSError:
            if not _is_there(folder, files):  # else another process was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_there(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Whether a folder has these files, and no others."""
    try:
        return sorted(os.listdir(folder)) == sorted(files) and all(
            (folder / name).read_bytes() == content for name, content in files.items()
        )
    except OSError:
        return False


def _cleaned(name: str, content: bytes) -> bytes:
    """The content of a file, without settings that are left out."""
    if not name.endswith(".json"):
        return content
    settings = name in _SETTINGS
    if settings and len(content) > _MOST_SETTINGS:
        raise LoadError(f"`{name}` of the server's model has {len(content):,} bytes.", here())
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return _encoded(_without(found, 0)) if settings else content
    except (ValueError, RecursionError) as error:
        raise LoadError(f"`{name}` of the server's model cannot be read: {error}", here()) from None


def _without(value: Any, depth: int) -> Any:
    """A setting without those in it that are left out."""
    if depth > _MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, list):
        return [_without(item, depth + 1) for item in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, Any]", value)
    for key, item in entries.items():
        if _COUNTS.fullmatch(key) and isinstance(item, int) and item > _MOST_PARTS:
            raise ValueError(f"it has {item:,} as `{key:.100}`")
    return {key: _without(item, depth + 1) for key, item in entries.items() if _stays(key, item)}


def _stays(key: str, value: Any) -> bool:
    """Whether a setting is kept."""
    plain = key.lstrip("_")
    if key in ("dtype", "torch_dtype"):
        return value is None or value in _DTYPES
    return plain not in _LEFT_OUT and not plain.endswith(_LEFT_OUT_ENDINGS)


def _known_tokenizer(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The settings of a tokenizer whose class this version of Transformers does not have."""
    import transformers

    if not {"tokenizer.json", "tokenizer_config.json"} <= files.keys():
        return {}
    settings = json.loads(files["tokenizer_config.json"])
    kind = settings.get("tokenizer_class")
    if not isinstance(kind, str) or isinstance(getattr(transformers, kind, None), type):
        return {}
    # What it does is all in `tokenizer.json`, which this class reads in every version.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {"tokenizer_config.json": _encoded(settings)}


def _encoded(settings: Mapping[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, indent=2).encode()


def _dtype_of(module: nn.Module) -> str:
    """The dtype of most weights of a model."""
    counts = Counter[str]()
    for weight in module.parameters():
        if weight.is_floating_point():
            counts[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    found = counts.most_common(1)[0][0] if counts else "float32"
    return found if found in _DTYPES else "float32"


def _generation_config(model: Described) -> Any:
    """What generations of a model take unless told, None if it generates nothing."""
    found = getattr(model.module, "generation_config", None)
    config: Any = model.module.config
    place = getattr(config, "name_or_path", "")
    if found is None or model.loaded or not place:
        return found
    from transformers import GenerationConfig  # it is read with the weights

    with suppress(Exception):  # there is none, or the config is not that of files
        revision = getattr(config, "_commit_hash", None)
        return GenerationConfig.from_pretrained(
            place, **({"revision": revision} if revision else {})
        )
    return found


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files of a tokenizer, none if there is no tokenizer of Transformers."""
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory(prefix="insitu-") as folder:
        tokenizer.save_pretrained(folder)
        return {
            name: Path(folder, name).read_bytes()
            for name in os.listdir(folder)
            if name in FILES and name != "config.json"
        }
