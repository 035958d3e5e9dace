"""Files of what methods found: tensors and a description of them, in one safetensors file.

A file is written whole or not at all. Reading one runs no code, and a description is read as
the type that its kind declares: nothing else gets out of a file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
import torch

from insitu import disk
from insitu.graph.errors import InsituError, LoadError
from insitu.graph.location import here

_FORMAT = "insitu"
_VERSION = 1
_LONGEST = 64 * 2**20
"""How many bytes a description may have: some millions of labels."""

_DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
"""What can be averaged, drawn and printed."""

Told = TypeVar("Told")
Made = TypeVar("Made")


class _About(msgspec.Struct):
    """The metadata of a file.

    Attributes:
        kind: the kind of its content.
        version: the version of the format.
        told: the description, which is read as a type of its own.
    """

    kind: str
    version: int
    told: msgspec.Raw


class Tensors:
    """The tensors of a file, checked as they are taken.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self._sizes: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, axes: str, floating: bool = True) -> torch.Tensor:
        """Takes a tensor out.

        Args:
            name: its name.
            axes: the names of its axes, such as "layer width". Axes of one name have one length,
                in other tensors of the file too. "..." for any axes.
            floating: whether it has to be of a floating dtype.

        Raises:
            LoadError: if it is missing, or if its axes or its dtype are others.
        """
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise LoadError(f"it has no tensor {name!r}.")
        if tensor.dtype not in _DTYPES or (floating and not tensor.is_floating_point()):
            raise LoadError(f"its tensor {name!r} is of {tensor.dtype}.")
        if axes != "...":
            self._check_axes(name, tensor, axes.split())
        return tensor

    def rest(self, prefix: str) -> dict[str, torch.Tensor]:
        """Takes out all tensors whose names begin in one way, by the rest of their names.

        Args:
            prefix: what the names begin with.

        Raises:
            LoadError: if the dtype of one cannot be used.
        """
        names = [name for name in self._tensors if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.take(name, "...", False) for name in names}

    def _check_axes(self, name: str, tensor: torch.Tensor, wanted: list[str]) -> None:
        sizes = dict(self._sizes)
        fits = len(wanted) == tensor.ndim and all(
            sizes.setdefault(axis, size) == size
            for axis, size in zip(wanted, tensor.shape, strict=True)
        )
        if not fits:
            known = [f"{axis} {self._sizes[axis]}" for axis in wanted if axis in self._sizes]
            raise LoadError(
                f"its tensor {name!r} of shape {tuple(tensor.shape)} does not have the axes "
                f"({', '.join(wanted)})" + (f" with {', '.join(known)}." if known else ".")
            )
        self._sizes = sizes


def write(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, torch.Tensor], told: Any
) -> None:
    """Writes a file.

    Args:
        path: where to. A file that is there is replaced once the new one is complete.
        kind: the kind of its content, such as "result".
        tensors: its tensors by name.
        told: the description, an instance of the type that `read` is given.

    Raises:
        OptionError: if there is no such folder.
        SaveError: if the file cannot be written.
    """
    from safetensors.torch import save

    about = _About(kind, _VERSION, msgspec.Raw(msgspec.json.encode(told)))
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {_FORMAT: msgspec.json.encode(about).decode()}
    disk.write(path, save(kept, metadata=metadata))


def read(
    path: str | os.PathLike[str],
    kind: str,
    description: type[Told],
    made: Callable[[Told, Tensors], Made],
) -> Made:
    """Reads a file.

    Args:
        path: the file.
        kind: what has to be in it.
        description: the type of its description.
        made: makes the result of the description and the tensors.

    Raises:
        LoadError: if there is no such file, if something else is in it, or if its content is not as
            its kind has to be.
    """
    tensors, metadata = read_tensors(path)
    written = metadata.get(_FORMAT)
    about: _About | None = None if written is None else _decoded(path, written.encode(), _About)
    if about is None or about.kind != kind:
        found = "something of another library" if about is None else about.kind[:100]
        raise LoadError(f"{os.fspath(path)!r} holds no {kind}, but {found}.", here())
    if about.version != _VERSION:
        raise LoadError(
            f"{os.fspath(path)!r} is of version {about.version}, and this is {_VERSION}.", here()
        )
    told: Told = _decoded(path, bytes(about.told), description)
    try:
        return made(told, Tensors(tensors))
    except InsituError as error:
        raise LoadError(
            f"{os.fspath(path)!r} is no {kind} that can be read: {str(error).splitlines()[0]}",
            here(),
        ) from None


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns the tensors of a safetensors file, and its metadata.

    Args:
        path: the file.

    Raises:
        LoadError: if it is no such file.
    """
    from safetensors import safe_open

    disk.check_readable(path)
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        if len(start) == 8 and struct.unpack("<Q", start)[0] > _LONGEST:
            raise ValueError(f"its header would have more than {_LONGEST} bytes")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:  # of many types: of a dtype that torch lacks, `AttributeError`
        raise LoadError(f"{os.fspath(path)!r} cannot be read: {error}", here()) from None


def _decoded(path: str | os.PathLike[str], data: bytes, wanted: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=wanted)
    # `ValueError` is that of text which is no UTF-8; deep nesting is a `RecursionError`.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise LoadError(
            f"{os.fspath(path)!r} cannot be read: its description is wrong: {error}", here()
        ) from None
