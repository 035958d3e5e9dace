"""Tensors as bytes, in the safetensors format.

Each is stored as a row of bytes, with its dtype and its shape beside it: not every version of
safetensors knows every dtype.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import msgspec
import safetensors.torch
import torch

from insitu.graph.errors import WireError
from insitu.graph.wire_message import DigestedTensor, StoredTensor
from insitu.graph.wire_values import device, dtype, is_whole

_TOO_LARGE = 2**63
"""PyTorch cannot compute the strides of a tensor of so many bytes, even if an axis is empty."""


def stored(tensors: Sequence[torch.Tensor]) -> tuple[list[StoredTensor], bytes]:
    """Returns what tensors look like, and their bytes."""
    described = [StoredTensor(str(t.dtype), list(t.shape), str(t.device)) for t in tensors]
    rows = {str(number): bytes_of(tensor) for number, tensor in enumerate(tensors)}
    return described, safetensors.torch.save(rows) if rows else b""


def restored(described: Sequence[StoredTensor], data: bytes) -> list[torch.Tensor]:
    """Returns the tensors of `stored`. None shares memory with another.

    Raises:
        WireError: if the bytes are not those of tensors that look so.
    """
    rows = _rows(data)
    if set(rows) != set(map(str, range(len(described)))):
        raise WireError("it does not come with the tensors that it names")
    return [tensor_of(rows[str(number)], how) for number, how in enumerate(described)]


def digest_of(tensor: torch.Tensor) -> str:
    """Returns a digest of what a tensor is: of its dtype, its shape and its content.

    Args:
        tensor: the tensor, on any device.
    """
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    found.update(cast(Any, bytes_of(tensor).numpy()))
    return found.hexdigest()


_MOST_COPIED = 2**28
"""How many bytes of leaves may be copies of others, which came with the bytes of one."""

Identity = tuple[str, str, int]
"""What tells tensors of a message apart: digest, device, and the number of a leaf."""


def stored_by_digest(
    tensors: Mapping[Identity, torch.Tensor], without: Collection[str]
) -> tuple[list[DigestedTensor], bytes]:
    """Returns what tensors look like, and their bytes.

    Args:
        tensors: the tensors, by what tells them apart.
        without: the digests of those whose bytes are left out.
    """
    described: list[DigestedTensor] = []
    rows: dict[str, torch.Tensor] = {}
    for (digest, place, leaf), tensor in tensors.items():
        how = StoredTensor(str(tensor.dtype), list(tensor.shape), place)
        described.append(DigestedTensor(how, digest, leaf))
        if digest not in without:
            rows[digest] = bytes_of(tensor)
    return described, safetensors.torch.save(rows) if rows else b""


def restored_by_digest(
    described: Sequence[DigestedTensor],
    data: bytes,
    elsewhere: Mapping[str, torch.Tensor],
    place: torch.device | None = None,
) -> list[torch.Tensor]:
    """Returns the tensors of `stored_by_digest`.

    Args:
        described: what they look like.
        data: the bytes of those that came with the message.
        elsewhere: the others, by digest.
        place: the device that all of them are put on; None for those that they were on.

    Raises:
        WireError: if one is missing, or is not what its digest says.
    """
    rows = _rows(data)
    if not rows.keys() <= {one.digest for one in described}:
        raise WireError("it comes with tensors that it does not name")
    known: set[Identity] = set()
    leaves, copied = set[str](), 0
    # One on many devices is read once: bytes must not cost more than their length.
    read: dict[str, torch.Tensor] = {}
    restored: list[torch.Tensor] = []
    for one in described:
        identity = (one.digest, one.tensor.device, one.leaf)
        if identity in known:
            raise WireError("it names a tensor twice")
        known.add(identity)
        to = device(one.tensor.device) if place is None else place
        if one.digest not in read:
            read[one.digest] = _by_digest(one, rows, elsewhere, to)
        found = read[one.digest]
        if (str(found.dtype), list(found.shape)) != (one.tensor.dtype, one.tensor.shape):
            raise WireError(f"the tensor {one.digest:.16}... is not what its digest says")
        if one.leaf:
            copied += found.nbytes if one.digest in leaves else 0
            leaves.add(one.digest)
            if copied > _MOST_COPIED:
                raise WireError(f"its equal leaves take more than {_MOST_COPIED:,} bytes")
        placed = _placed(found, to)
        restored.append(_leaf_of(placed) if one.leaf else placed)
    return restored


def _leaf_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient is to come back, in memory of its own."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        raise WireError(f"a tensor of {tensor.dtype} has no gradient")
    return tensor.clone().requires_grad_()


def _by_digest(
    one: DigestedTensor,
    rows: Mapping[str, torch.Tensor],
    elsewhere: Mapping[str, torch.Tensor],
    place: torch.device,
) -> torch.Tensor:
    """A tensor that came with a message, or is elsewhere, if it is what its digest says."""
    how = msgspec.structs.replace(one.tensor, device=str(place))
    found = tensor_of(rows[one.digest], how) if one.digest in rows else None
    found = elsewhere.get(one.digest) if found is None else found
    if found is None:
        raise WireError(
            f"the tensor {one.digest:.16}... of {one.tensor.dtype:.40} did not come with it: give "
            "it in `tensors`"
        )
    if digest_of(found) != one.digest:
        raise WireError(f"the tensor {one.digest:.16}... is not what its digest says")
    return found


def _rows(data: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data) if data else {}
    except Exception as error:  # it raises several kinds, not all of them its own
        raise WireError(f"its tensors cannot be read: {error}") from None


def digests_in(data: bytes) -> set[str]:
    """Returns the digests of the tensors that came with a message, as it says.

    Args:
        data: the bytes of those tensors.

    Raises:
        WireError: if they are no such bytes.
    """
    return set(_rows(data))


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of the content of a tensor as a row of bytes on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def tensor_of(row: torch.Tensor, how: StoredTensor) -> torch.Tensor:
    """Returns the tensor whose content a row of bytes is, in the same memory.

    Args:
        row: the bytes.
        how: what they mean.

    Raises:
        WireError: if they do not mean that.
    """
    kind, place = dtype(how.dtype), device(how.device)
    if not is_whole(kind):
        raise WireError(f"no tensor of {kind} can be made")
    if row.dtype is not torch.uint8 or row.numel() != math.prod(how.shape) * kind.itemsize:
        raise WireError(f"a {how.dtype} tensor of shape {how.shape} has not {row.numel()} bytes")
    if math.prod(max(size, 1) for size in how.shape) * kind.itemsize >= _TOO_LARGE:
        raise WireError(f"no tensor has the shape {how.shape}")
    if kind is torch.bool and bool((row > 1).any()):
        raise WireError("a boolean tensor holds other values than true and false")
    try:
        return _placed(row.view(kind).reshape(how.shape), place)
    except RuntimeError as error:
        raise WireError(f"a tensor cannot be made: {error}") from None


def _placed(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """A tensor on a device, if this machine has it."""
    return tensor.to(place) if _is_here(place) else tensor


def _is_here(place: torch.device) -> bool:
    """Whether this machine has an accelerator, which the CPU is not."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = found is not None and found.type == place.type
    return present and (place.index or 0) < torch.accelerator.device_count()
