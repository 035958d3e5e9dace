"""A digest of a model's weights, of samples of them: other weights have another one.

A server tells the digest of its weights, so that a client whose model has others is told before
anything runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from insitu.graph.user_warnings import warn_user

_SAMPLES = 256
_HALF = 32


def weights_digest(module: nn.Module) -> str:
    """Returns a digest of the names, sizes and dtypes of a model's weights, and of some values.

    Training changes values everywhere, so a few hundred of each tensor tell. All of them would
    take as long as loading them.

    Args:
        module: the model, with its weights.

    Returns:
        64 hexadecimal digits. The first half is of names, sizes and dtypes, the second of values.
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in _kept(module):
        on_disk = tensor.device.type == "meta"
        structure.update(f"{name} {tensor.dtype} {[*tensor.shape]} {on_disk}\n".encode())
        if not on_disk:
            values.update(_sample(tensor.detach()))
    return structure.hexdigest()[:_HALF] + values.hexdigest()[:_HALF]


def have_other_values(one: str, other: str) -> bool:
    """Returns whether two digests are of the same tensors with other values.

    Of models with other names, sizes or dtypes it says nothing: another version of Transformers
    has other names for the same weights, and rounding to another dtype changes all values.

    Args:
        one: a digest, "" if it is not known.
        other: the other.
    """
    comparable = bool(one) and one[:_HALF] == other[:_HALF]
    return comparable and one != other


def _kept(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model that files have. Others, such as angles, depend on the machine."""
    yield from module.named_parameters()
    seen = set[int]()
    for path, part in module.named_modules():
        for name, buffer in part._buffers.items():
            passing = part._non_persistent_buffers_set
            if buffer is not None and name not in passing and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{path}.{name}", buffer


def _sample(tensor: torch.Tensor) -> bytes:
    """Some of a tensor's numbers, as bytes: of each of its parts, where it consists of others."""
    parts = _parts(tensor)
    if parts is not None:
        return b"".join(_sample(getattr(tensor, name)) for name in parts)
    if tensor.is_quantized:
        return _sample(tensor.dequantize())
    if tensor.layout is not torch.strided:
        # Where the entries of a sparse tensor stand counts as much as what they are.
        return _sample(tensor.to_dense())
    try:
        values = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)][:_SAMPLES]
        return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        warn_user(
            f"The weights of this model cannot be told from others: a {kind} gives no numbers "
            f"({type(error).__name__}: {error!s:.200}). What compares models will take any with "
            "tensors of these names and sizes for the same one."
        )
        return b""


def _parts(tensor: torch.Tensor) -> Sequence[str] | None:
    """The attributes with the tensors that one of a class of its own consists of: quantised ones.

    None for a tensor that has its numbers itself.
    """
    if type(tensor) in (torch.Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.__tensor_flatten__()[0]
