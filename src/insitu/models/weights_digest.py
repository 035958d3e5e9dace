"""A digest of a model's weights, of samples of them: other weights have another one."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

_SAMPLES = 256


def weights_digest(module: nn.Module) -> str:
    """Returns a digest of the names, sizes and dtypes of a model's tensors, and of some values.

    Training changes values everywhere, so a few hundred of each tensor tell. All of them would
    take as long as loading them.

    Args:
        module: the model, with its weights.
    """
    told = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        told.update(f"{name} {tensor.dtype} {[*tensor.shape]}\n".encode())
        if tensor.device.type != "meta":  # those are on a disk
            told.update(_sample(tensor.detach()))
    return told.hexdigest()


def _sample(tensor: torch.Tensor) -> bytes:
    try:
        values = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)][:_SAMPLES]
        return values.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError):
        # Of a class of its own, such as a quantised one, which has no numbers to pick from: its
        # name, dtype and shape are told of all the same.
        return b""
