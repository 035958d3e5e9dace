"""Compiled modules, run as they were written.

Hooks come and go with every block, and `torch.compile` would trace the model anew for each. So a
run goes around what has been compiled; outside of blocks that is used as before.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_torchdynamo_orig_callable"  # where what `torch.compile` gives has what it was given


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Returns whether any of these modules is under `torch.compile`, or its `forward` alone."""
    for module in modules:
        if module._compiled_call_impl is not None:  # pyright: ignore[reportUnknownMemberType]
            return True
        # A method that was compiled with its class has what it was written as, too.
        if hasattr(module.forward, _ORIGINAL):
            return True
    return False


def eager(compiled: bool) -> AbstractContextManager[Any]:
    """Returns a context in which modules run uncompiled.

    Args:
        compiled: whether any of them is compiled: if none is, there is nothing to be done.
    """
    return torch.compiler.set_stance("force_eager") if compiled else _AS_THEY_ARE


_AS_THEY_ARE = nullcontext()


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module that `torch.compile(module)` has wrapped, or else the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None or type(module).__name__ != "OptimizedModule" else inner
