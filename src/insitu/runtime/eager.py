"""Compiled modules, run as they were written.

Hooks come and go with every block, and `torch.compile` would trace the model anew for each. So a
run goes around what has been compiled; outside of blocks that is used as before.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
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


class Entered:
    """What calls of some modules entered when it was made: compiling one changes that.

    `Module.compile` and `module.forward = ...` give a module an attribute that it did not have, so
    numbers of attributes are compared: 15 ns a module. A module may also keep something else in an
    attribute of its own; only then are all looked at one by one.

    Args:
        modules: the modules. The first is the root, which is compared closely.
    """

    __slots__ = ("_compiled", "_forward", "_modules", "_own", "_root", "_sizes", "_states")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._states = [vars(module) for module in modules]
        self._forward = type(modules[0]).forward
        self._root = self._entry()
        self._compiled = is_compiled(modules)
        self._remember()

    def still_holds(self) -> bool:
        """Returns whether the calls still enter what they entered."""
        if (
            self._sizes == [*map(len, self._states)]
            and type(self._modules[0]).forward is self._forward
            and (not self._own or self._own == self._forwards())
        ):
            return True
        if self._root != self._entry() or self._compiled != is_compiled(self._modules):
            return False
        self._remember()
        return True

    def _remember(self) -> None:
        self._sizes = [*map(len, self._states)]
        self._own = self._forwards()

    def _forwards(self) -> list[Any]:
        return [state["forward"] for state in self._states if "forward" in state]

    def _entry(self) -> tuple[object, ...]:
        """What a call of the root enters."""
        state = self._states[0]
        return (
            state.get("_compiled_call_impl"),
            state.get("forward"),
            type(self._modules[0]).forward,
        )


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
