"""Compiled modules, run as they were written.

Hooks come and go with every block, and `torch.compile` would trace the model anew for each. So a
run goes around what has been compiled; outside of blocks that is used as before.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

_ORIGINAL = "_torchdynamo_orig_callable"  # where what `torch.compile` gives has what it was given


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Returns whether any of these modules is under `torch.compile`, or its `forward` alone."""
    modules = [*modules]
    states: Iterable[dict[str, Any]] = map(vars, modules)
    for state in states:  # few have either
        if state.get("_compiled_call_impl") is not None or (
            "forward" in state and hasattr(state["forward"], _ORIGINAL)
        ):
            return True
    # A method that was compiled with its class has what it was written as, too.
    kinds: set[type[nn.Module]] = {*map(type, modules)}
    return any(hasattr(kind.forward, _ORIGINAL) for kind in kinds)


def eager(compiled: bool) -> AbstractContextManager[Any]:
    """Returns a context in which modules run uncompiled.

    Args:
        compiled: whether any of them is compiled: if none is, there is nothing to be done.
    """
    return torch.compiler.set_stance("force_eager") if compiled else _AS_THEY_ARE


_AS_THEY_ARE = nullcontext()


@contextmanager
def eagerly(held: AbstractContextManager[Any]) -> Generator[None, None, None]:
    """Enters another context, and one in which modules run uncompiled.

    Args:
        held: the other: where nothing is compiled, it alone will do.
    """
    with held, eager(True):
        yield


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module that `torch.compile(module)` has wrapped, or else the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None or type(module).__name__ != "OptimizedModule" else inner
