"""Compiled modules, run as they were written.

Hooks come and go with every block, and `torch.compile` would trace the model anew for each. So a
run goes around what has been compiled; outside of blocks that is used as before.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from insitu.engine.exclusive import Exclusive
from insitu.engine.interpose import CALL
from insitu.graph.changes import Changes, changing

_ORIGINAL = "_torchdynamo_orig_callable"  # where what `torch.compile` gives has what it was given


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Returns whether any of these modules is under `torch.compile`, or its `forward` alone."""
    modules = [*modules]
    states: Iterable[dict[str, Any]] = map(vars, modules)
    for state in states:  # few have either
        if state.get(CALL) is not None or (
            "forward" in state and hasattr(state["forward"], _ORIGINAL)
        ):
            return True
    # A method that was compiled with its class has what it was written as, too.
    kinds: set[type[nn.Module]] = {*map(type, modules)}
    return any(hasattr(kind.forward, _ORIGINAL) for kind in kinds)


def run_uncompiled(changes: Changes, compiled: bool) -> None:
    """Lets modules run uncompiled until the changes are undone.

    Args:
        changes: notes it.
        compiled: whether any of them is compiled: if none is, there is nothing to be done.
    """
    # Hooks that come and go would have compiled parts traced anew for each block, until the limit
    # of recompiling is reached.
    if compiled:
        stances: list[Any] = []
        changes.afterwards(partial(_leave_all, stances))
        stances.append(torch.compiler.set_stance("force_eager"))  # made is entered


def _leave_all(stances: list[Any]) -> None:
    for stance in stances:
        stance.__exit__(None, None, None)


@contextmanager
def eagerly(held: Exclusive) -> Generator[None, None, None]:
    """Has a module in use, with compiled parts run as they were written.

    Args:
        held: who may use the module: where nothing is compiled, it alone will do.
    """
    with changing() as changes:
        held.take_until(changes)
        run_uncompiled(changes, True)
        yield


def uncompiled(module: nn.Module) -> nn.Module:
    """Returns the module that `torch.compile(module)` has wrapped, or else the module itself."""
    inner = module._modules.get("_orig_mod")
    # By its name: the class is in a private module of torch.
    return module if inner is None or type(module).__name__ != "OptimizedModule" else inner
