"""A shard as a memory map: rows are copied out of it, and nothing else is read.

The header is read here and not by safetensors, since every size in it is compared with the
manifest and the file before anything is mapped. The file may come from anybody.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import numpy as np
import torch

from insitu.graph.errors import LoadError
from insitu.graph.location import here
from insitu.harvest.layout import DOCUMENT, POSITION, SEQUENCE, TOKEN_IDS, Line, shard_name
from insitu.harvest.reading.opening import sums_of_site, tensors_of_site
from insitu.harvest.specification import Specification

ROW_DTYPES = {
    TOKEN_IDS: torch.int32,
    SEQUENCE: torch.int64,
    POSITION: torch.int32,
    DOCUMENT: torch.int64,
}
"""The dtypes of the tensors that say where rows come from."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""What safetensors calls a dtype."""

_START = struct.Struct("<Q")
_LONGEST_HEADER = 16 * 2**20
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # without it, opening a pipe waits for a writer
_BINARY = getattr(os, "O_BINARY", 0)
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Tensor(msgspec.Struct):
    """What a header says of a tensor."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


_header = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_tensor = msgspec.json.Decoder(_Tensor).decode


class MappedShard:
    """The tensors of a shard, which stay on disk until rows are taken.

    Args:
        path: the file, for errors.
        data: the bytes of the file, mapped.
        places: of each tensor its first byte, its dtype and its shape.
    """

    def __init__(
        self,
        path: Path,
        data: mmap.mmap,
        places: Mapping[str, tuple[int, torch.dtype, tuple[int, ...]]],
    ) -> None:
        self._path = path
        self._data = data
        self._places = places

    def bytes_of(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Returns the rows of a tensor as bytes, `(rows, bytes of a row)`: a view of the file."""
        start, dtype, shape = self._places[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        whole = np.frombuffer(self._data, np.uint8, shape[0] * row, start)
        return whole.reshape(shape[0], row)

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a whole tensor, as a copy."""
        start, dtype, shape = self._places[name]
        made = torch.empty(shape, dtype=dtype)
        count = made.numel() * dtype.itemsize
        if count:
            flat = made.reshape(-1).view(torch.uint8).numpy()
            flat[:] = np.frombuffer(self._data, np.uint8, count, start)
        return made


def open_shard(folder: Path, specification: Specification, line: Line) -> MappedShard:
    """Maps a shard into memory, after its header is checked.

    Args:
        folder: the folder of activations.
        specification: says which tensors there have to be.
        line: what the manifest says of the shard.

    Raises:
        LoadError: if there is no such file, or one that is not as the manifest says.
    """
    path = folder / shard_name(line.shard)
    data = _mapped(path, line)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    wanted.update({name: (dtype, (line.rows,)) for name, dtype in ROW_DTYPES.items()})
    for site in specification.sites:
        for name, (dtype, shape) in tensors_of_site(site).items():
            wanted[name] = dtype, (line.rows, *shape)
        wanted.update(sums_of_site(site))
    start, header = _read_header(path, data)
    room = len(data) - start
    places: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
    for name, (dtype, shape) in wanted.items():
        if name not in header:
            _refuse(path, f"it has no tensor {name!r}")
        try:
            told = _tensor(header[name])
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _refuse(path, f"its header is wrong: {error}")
        if told.dtype != _NAMES[dtype] or tuple(told.shape) != shape:
            _refuse(
                path,
                f"its tensor {name!r} is {told.dtype[:20]} {told.shape}, not {_NAMES[dtype]} "
                f"{list(shape)}",
            )
        first, stop = told.data_offsets
        if not first <= stop <= room or stop - first != math.prod(shape) * dtype.itemsize:
            _refuse(path, f"its tensor {name!r} does not lie within the file")
        places[name] = start + first, dtype, shape
    return MappedShard(path, data, places)


def _mapped(path: Path, line: Line) -> mmap.mmap:
    try:
        number = os.open(path, os.O_RDONLY | _NO_WAIT | _BINARY)
        try:
            state = os.fstat(number)
            if not stat.S_ISREG(state.st_mode):
                _refuse(path, "it is not a regular file")
            if state.st_size != line.bytes or state.st_size < _START.size:
                _refuse(path, f"it has {state.st_size} bytes, and the manifest says {line.bytes}")
            return mmap.mmap(number, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(number)
    except LoadError:
        raise
    except (OSError, ValueError) as error:
        _refuse(path, getattr(error, "strerror", None) or str(error))


def _read_header(path: Path, data: mmap.mmap) -> tuple[int, dict[str, msgspec.Raw]]:
    """Where the tensors begin in a file, and what its header says of each."""
    (length,) = _START.unpack(data[: _START.size])
    start = _START.size + length
    if length > _LONGEST_HEADER or start > len(data):
        _refuse(path, "its header would be longer than it may be")
    try:
        return start, _header(data[_START.size : start])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _refuse(path, f"its header cannot be read: {error}")


def _refuse(path: Path, why: str) -> NoReturn:
    raise LoadError(
        f"The shard {os.fspath(path)!r} cannot be used: {why}. `harvest(..., verify=True)` makes "
        "broken shards anew.",
        here(),
    )
