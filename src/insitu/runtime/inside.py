"""Inside a forward: the torch functions that a module's own forward calls.

They are found while it runs, by a `TorchFunctionMode` that is active in that module and in no
other, also not in the modules that it calls.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Visit = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call of a torch function, given its name, the function and its arguments."""


class Called(NamedTuple):
    """A torch function that a forward called.

    Attributes:
        name: its name, such as "softmax".
        inputs: `(args, kwargs)`, with fake tensors.
        output: what it returned, likewise.
    """

    name: str
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
    output: Any


class _Inside(TorchFunctionMode):
    """Hands each call of a torch function over."""

    def __init__(self, visit: Visit, caches: Collection[str]) -> None:
        super().__init__()
        self.visit = visit
        self.caches = caches
        self.depth = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if self.depth or name in ("get", "set", "") or in_cache(self.caches):  # or properties
            return func(*args, **(kwargs or {}))
        return self.visit(name, func, args, kwargs or {})


def in_cache(caches: Collection[str]) -> bool:
    """Returns whether it is a cache of keys and values that calls a torch function.

    To be called by what is handed the call. What a cache does is not counted among the functions
    that a forward calls, so that these have the same numbers whether there is a cache or not.

    Args:
        caches: the names of the Python modules that caches are written in.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") in caches


@contextmanager
def watched(
    module: nn.Module, visit: Visit, caches: Collection[str]
) -> Generator[None, None, None]:
    """Lets the torch functions of a module's own forward be called by somebody else.

    Args:
        module: the module. It is changed for the duration.
        visit: makes the calls.
        caches: as of `in_cache`: the calls of these are left alone.
    """
    changed: list[tuple[nn.Module, str, Any]] = []

    def replace(part: nn.Module, name: str, function: Callable[..., Any]) -> None:
        changed.append((part, name, vars(part).get(name, _ABSENT)))
        vars(part)[name] = function

    replace(module, "forward", partial(_observed, visit, caches, module.forward, stack := []))
    for child in dict.fromkeys(module.children()):
        call = cast("Callable[..., Any]", child._call_impl)  # pyright: ignore[reportUnknownMemberType]
        replace(child, "_call_impl", partial(_unobserved, call, stack))
    try:
        yield
    finally:
        for part, name, before in reversed(changed):
            if before is _ABSENT:
                del vars(part)[name]
            else:
                vars(part)[name] = before


def _observed(
    visit: Visit,
    caches: Collection[str],
    forward: Callable[..., Any],
    stack: list[_Inside],
    *args: Any,
    **kwargs: Any,
) -> Any:
    mode = _Inside(visit, caches)
    stack.append(mode)
    try:
        with mode:
            return forward(*args, **kwargs)
    finally:
        stack.pop()


def _unobserved(call: Callable[..., Any], stack: list[_Inside], *args: Any, **kwargs: Any) -> Any:
    if not stack:
        return call(*args, **kwargs)
    mode = stack[-1]
    mode.depth += 1
    try:
        return call(*args, **kwargs)
    finally:
        mode.depth -= 1


def returns_tensors(value: Any) -> bool:
    """Returns whether a function's result is a tensor, or a tuple with one."""
    if isinstance(value, tuple | list):
        return any(map(returns_tensors, cast("tuple[Any, ...]", value)))
    return isinstance(value, torch.Tensor)


_ABSENT = object()
