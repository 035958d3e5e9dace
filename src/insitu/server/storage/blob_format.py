"""Whether some bytes are the tensor that a digest stands for.

They are a safetensors file with one tensor, "tensor". The digest is that of
`insitu.graph.wire_tensors.digest_of`: of its dtype, its shape and its content. It is computed from
the bytes themselves, so no tensor is made, and a large file is not copied.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import struct
from typing import Annotated, NoReturn

import msgspec

from insitu.remote.problems import Problem, ProblemError

_LONGEST_HEADER = 64 * 2**10
_PIECE = 2**20
_SIZE = struct.Struct("<Q")
_TOO_LARGE = 2**63
"""PyTorch cannot compute the strides of a tensor of so many bytes, even if an axis is empty."""

DTYPES: dict[str, tuple[str, int]] = {
    "BOOL": ("torch.bool", 1),
    "U8": ("torch.uint8", 1),
    "I8": ("torch.int8", 1),
    "U16": ("torch.uint16", 2),
    "I16": ("torch.int16", 2),
    "U32": ("torch.uint32", 4),
    "I32": ("torch.int32", 4),
    "U64": ("torch.uint64", 8),
    "I64": ("torch.int64", 8),
    "F8_E4M3": ("torch.float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("torch.float8_e4m3fnuz", 1),
    "F8_E5M2": ("torch.float8_e5m2", 1),
    "F8_E5M2FNUZ": ("torch.float8_e5m2fnuz", 1),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "F32": ("torch.float32", 4),
    "F64": ("torch.float64", 8),
    "C64": ("torch.complex64", 8),
}
"""The dtypes of safetensors: what PyTorch calls them, and the bytes of a number."""

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    tensor: _Tensor
    metadata: dict[str, str] = msgspec.field(name="__metadata__", default_factory=dict[str, str])


_header_of = msgspec.json.Decoder(_Header).decode


def check_blob(digest: str, data: memoryview) -> None:
    """Raises if bytes are not the tensor that a digest stands for.

    Args:
        digest: the digest.
        data: the bytes of a safetensors file.

    Raises:
        ProblemError: 422 "blob" if they are no such file, 422 "digest" if they are another
            tensor.
    """
    if len(data) < _SIZE.size:
        _refuse("it has no header")
    (length,) = _SIZE.unpack(data[: _SIZE.size])
    start = _SIZE.size + length
    if length > _LONGEST_HEADER or start > len(data):
        _refuse("it has no header, or too long a one")
    try:
        tensor = _header_of(data[_SIZE.size : start]).tensor
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _refuse(f"its header cannot be read: {error}")
    if _doubled(data[_SIZE.size : start]):
        _refuse("its header says something twice, which readers take in different ways")
    if tensor.dtype not in DTYPES:
        _refuse(f"it has the dtype {tensor.dtype[:40]!r}")
    name, width = DTYPES[tensor.dtype]
    if math.prod(max(one, 1) for one in tensor.shape) * width >= _TOO_LARGE:
        _refuse("PyTorch has no tensor of its shape")
    size = math.prod(tensor.shape) * width
    if tensor.data_offsets != (0, size) or start + size != len(data):
        _refuse("its length is not that of the tensor in its header")
    with data[start:] as content:
        found = hashlib.sha256(f"{name} {tensor.shape} ".encode())
        for place in range(0, size, _PIECE):
            with content[place : place + _PIECE] as piece:
                # PyTorch does with other bytes in a boolean tensor as it likes.
                if tensor.dtype == "BOOL" and piece.tobytes().translate(None, b"\0\1"):
                    _refuse("a boolean tensor holds other values than true and false")
                found.update(piece)
    if not hmac.compare_digest(found.hexdigest(), digest):
        raise ProblemError(
            Problem(
                "digest",
                "Another tensor",
                422,
                f"The tensor has the digest {found.hexdigest()}, and was sent as {digest:.64}.",
            )
        )


def _doubled(header: memoryview) -> bool:
    """Whether an object of a header has a field twice. The bytes behind it are of no interest."""
    found = False

    def seen(pairs: list[tuple[str, object]]) -> None:
        nonlocal found
        found = found or len({name for name, _ in pairs}) < len(pairs)

    json.loads(header.tobytes(), object_pairs_hook=seen)
    return found


def _refuse(why: str) -> NoReturn:
    raise ProblemError(
        Problem(
            "blob",
            "No tensor",
            422,
            f"The body is no safetensors file with one tensor, 'tensor': {why}.",
        )
    )
