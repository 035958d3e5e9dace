"""Settings of torch, around a run, that decide of what dtype its values are."""

from __future__ import annotations

import torch

Ambient = tuple[torch.dtype | None, ...]
"""The default dtype, and that of autocast on each kind of device, None where it is off."""

_KINDS = ("cpu", "cuda")


def ambient() -> Ambient:
    """Returns the settings that are in force."""
    return (torch.get_default_dtype(), *map(autocast_dtype, _KINDS))


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Returns the dtype of autocast on a kind of device, None if it is off.

    Args:
        kind: the kind, such as "cuda".
    """
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
