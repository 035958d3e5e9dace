"""Files of what methods found: tensors and what is said of them, in one safetensors file.

A file is written whole or not at all, and reading one runs no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from insitu.graph.errors import LoadError, OptionError
from insitu.graph.location import here

_FORMAT = "insitu"
_VERSION = 1


def write(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], told: Any
) -> None:
    """Writes a file.

    Args:
        path: where to. A file that is there is replaced once the new one is complete.
        kind: what is in it, such as "result".
        tensors: its tensors by name.
        told: whatever else there is to keep, in JSON's own types.

    Raises:
        OptionError: if there is no such folder.
    """
    from safetensors.torch import save

    path = Path(path)
    if not path.parent.is_dir():
        raise OptionError(f"There is no folder {os.fspath(path.parent)!r} to write to.", here())
    about = {"kind": kind, "version": _VERSION, "told": told}
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        # Not `save_file`, which lets nobody else read the file, whatever the umask.
        beside.write_bytes(save(kept, metadata={_FORMAT: json.dumps(about)}))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    """Returns the tensors of a file, and what else it keeps.

    Args:
        path: the file.
        kind: what has to be in it.

    Raises:
        LoadError: if there is no such file, or something else is in it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(_FORMAT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{os.fspath(path)!r} cannot be read: {error}", here()) from None
    if not isinstance(about, dict) or about.get("kind") != kind:
        found = about.get("kind") if isinstance(about, dict) else "something of another library"
        raise LoadError(f"{os.fspath(path)!r} holds no {kind}, but {found}.", here())
    if about.get("version") != _VERSION:
        raise LoadError(
            f"{os.fspath(path)!r} is of version {about.get('version')}, and this is {_VERSION}.",
            here(),
        )
    return tensors, about["told"]
