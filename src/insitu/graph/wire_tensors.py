"""Tensors as bytes, in the safetensors format.

Each is stored as a row of bytes, with its dtype and its shape beside it: not every version of
safetensors knows every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import msgspec
import safetensors.torch
import torch

from insitu.graph.errors import WireError
from insitu.graph.wire_parts import Index, Part
from insitu.graph.wire_values import device, dtype, is_whole


class StoredTensor(Part):
    """What the bytes of a tensor mean.

    Attributes:
        dtype: such as "torch.bfloat16".
        shape: the length of each axis.
        device: where it was. It is put there again if the reader's machine has such a device.
    """

    dtype: str
    shape: Annotated[list[Index], msgspec.Meta(max_length=64)]
    device: str


def stored(tensors: Sequence[torch.Tensor]) -> tuple[list[StoredTensor], bytes]:
    """Returns what tensors look like, and their bytes."""
    described = [StoredTensor(str(t.dtype), list(t.shape), str(t.device)) for t in tensors]
    rows = {str(number): _bytes_of(tensor) for number, tensor in enumerate(tensors)}
    return described, safetensors.torch.save(rows) if rows else b""


def restored(described: Sequence[StoredTensor], data: bytes) -> list[torch.Tensor]:
    """Returns the tensors of `stored`, none of which shares memory with another.

    Raises:
        WireError: if the bytes are not those of tensors that look so.
    """
    try:
        rows = safetensors.torch.load(data) if data else {}
    except Exception as error:  # it raises several kinds, not all of them its own
        raise WireError(f"its tensors cannot be read: {error}") from None
    if set(rows) != set(map(str, range(len(described)))):
        raise WireError("it does not come with the tensors that it names")
    return [_tensor(rows[str(number)], how) for number, how in enumerate(described)]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _tensor(row: torch.Tensor, how: StoredTensor) -> torch.Tensor:
    kind, place = dtype(how.dtype), device(how.device)
    if not is_whole(kind):
        raise WireError(f"no tensor of {kind} can be made")
    if row.dtype is not torch.uint8 or row.numel() != math.prod(how.shape) * kind.itemsize:
        raise WireError(f"a {how.dtype} tensor of shape {how.shape} has not {row.numel()} bytes")
    if kind is torch.bool and bool((row > 1).any()):
        raise WireError("a boolean tensor holds other values than true and false")
    try:
        tensor = row.view(kind).reshape(how.shape)
        return tensor.to(place) if _is_here(place) else tensor
    except RuntimeError as error:
        raise WireError(f"a tensor cannot be made: {error}") from None


def _is_here(place: torch.device) -> bool:
    """Whether this machine has an accelerator, which the CPU is not."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = found is not None and found.type == place.type
    return present and (place.index or 0) < torch.accelerator.device_count()
