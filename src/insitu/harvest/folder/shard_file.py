"""A shard as a file of safetensors, written from buffers and hashed on the way.

`safetensors.torch.save_file` copies each tensor, and the file would be read again for its digest.
Here nothing of a shard is copied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

_CHUNK = 1 << 22

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip
DTYPES = frozenset(_NAMES)
"""The dtypes that a shard can hold."""


class Written(NamedTuple):
    """A file that was written.

    Attributes:
        bytes: its size.
        sha256: the digest of its content.
    """

    bytes: int
    sha256: str


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """Writes tensors to a file, and waits until they are on the disk.

    Args:
        path: the file.
        tensors: contiguous tensors on the CPU, by name.

    Raises:
        OSError: as the system says.
    """
    # Those of large items come first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = dict[str, object](), 0
    for name in names:
        one = tensors[name]
        start, end = end, end + one.numel() * one.itemsize
        header[name] = {
            "dtype": _NAMES[one.dtype], "shape": [*one.shape], "data_offsets": [start, end]
        }  # fmt: skip
    told = json.dumps(header, separators=(",", ":")).encode()
    told += b" " * (-len(told) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        parts = (bytes_of(tensors[name]) for name in names)
        for part in (len(told).to_bytes(8, "little"), told, *parts):
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                digest.update(chunk)
                size += _write_all(file.fileno(), chunk)
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def digest_of(path: Path) -> str:
    """Returns the digest of the content of a file.

    Args:
        path: the file.

    Raises:
        OSError: as the system says.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor on the CPU.

    Args:
        tensor: the tensor.
    """
    if not tensor.numel():
        return memoryview(b"")
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _write_all(number: int, chunk: bytes | memoryview) -> int:
    """Writes all of something: the system may take a part only."""
    done = 0
    while done < len(chunk):
        done += os.write(number, chunk[done:])
    return done
