"""A module around another one of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Around(nn.Module):
    """Stands in the place of a module, and computes something of its own.

    Args:
        inner: the module.
        computes: what it computes, of that module and what it is given.
    """

    def __init__(self, inner: nn.Module, computes: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self._computes = computes

    def forward(self, x: torch.Tensor) -> Any:
        return self._computes(self.inner, x)
