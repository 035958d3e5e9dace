"""A digest of a model's weights, of samples or of all of them: other weights have another one.

A server tells the digest of samples, so that a client whose model has others is told before
anything runs. A harvest goes on for days, and knows its model by all of the values.
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
_CHUNK = 1 << 24  # numbers that are copied from a device at once


def weights_digest(module: nn.Module, *, whole: bool = False) -> str:
    """Returns a digest of the names, sizes and dtypes of a model's weights, and of their values.

    Training changes values everywhere, so a few hundred of each tensor tell. All of them take
    about as long as loading them: a second for each 1.5 GB.

    Args:
        module: the model, with its weights.
        whole: whether all values count. An ablation by hand changes some rows of one tensor only.

    Returns:
        64 hexadecimal digits. The first half is of names, sizes and dtypes, the second of values.
    """
    structure, values = hashlib.sha256(), hashlib.sha256()
    for name, tensor in _kept(module):
        on_disk = tensor.device.type == "meta"
        structure.update(f"{name} {tensor.dtype} {[*tensor.shape]} {on_disk}\n".encode())
        if not on_disk:
            for part in _bytes_of(tensor.detach(), whole):
                values.update(part)
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


def _bytes_of(tensor: torch.Tensor, whole: bool) -> Iterator[bytes]:
    """A tensor's numbers, or some of them, as bytes: of its parts, where it consists of others."""
    parts = _parts(tensor)
    if parts is not None:
        for name in parts:
            yield from _bytes_of(getattr(tensor, name), whole)
        return
    if tensor.is_quantized:
        yield from _bytes_of(tensor.dequantize(), whole)
        return
    if tensor.layout is not torch.strided:
        # Where the entries of a sparse tensor stand counts as much as what they are.
        yield from _bytes_of(tensor.to_dense(), whole)
        return
    try:
        values = tensor.reshape(-1)
        if not whole:
            values = values[:: max(1, tensor.numel() // _SAMPLES)][:_SAMPLES]
        for part in values.split(_CHUNK):
            yield part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        warn_user(
            f"The weights of this model cannot be told from others: a {kind} gives no numbers "
            f"({type(error).__name__}: {error!s:.200}). What compares models will take any with "
            "tensors of these names and sizes for the same one."
        )


def _parts(tensor: torch.Tensor) -> Sequence[str] | None:
    """The attributes with the tensors that one of a class of its own consists of: quantised ones.

    None for a tensor that has its numbers itself.
    """
    if type(tensor) in (torch.Tensor, nn.Parameter) or not is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.__tensor_flatten__()[0]
