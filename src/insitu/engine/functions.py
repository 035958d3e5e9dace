"""Inside a forward: the torch functions that a module's own forward calls.

They are found while it runs, by a `TorchFunctionMode` that is active in that module and in no
other, also not in the modules that it calls: see `interpose.Taps.functions`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch.overrides import TorchFunctionMode

from insitu.graph.changes import changing
from insitu.graph.node import Kind

Visit = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Makes a call of a torch function, given its name, the function and its arguments."""


class Called(NamedTuple):
    """A torch function that a forward called.

    Attributes:
        name: its name, such as "softmax".
        inputs: `(args, kwargs)`, with fake tensors.
        output: what it returned, with fake tensors.
    """

    name: str
    inputs: tuple[tuple[Any, ...], Mapping[str, Any]]
    output: Any


class Inside(TorchFunctionMode):
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

    To be called by the function that is handed the call. What a cache does is not counted among the
    functions that a forward calls, so that these have the same numbers whether there is a cache or
    not.

    Args:
        caches: the names of the Python modules that caches are written in.
    """
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") in caches


def observed(
    is_own: Callable[[], bool],
    visit: Visit,
    caches: Collection[str],
    forward: Callable[..., Any],
    active: list[Inside],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a forward, and hands its torch functions over.

    Args:
        is_own: whether the call belongs to the run.
        visit: makes the calls of the functions.
        caches: as of `in_cache`.
        forward: the forward.
        active: the modes that are on, the last innermost.
        args: what the forward is called with.
        kwargs: its keyword arguments.
    """
    if not is_own():
        return forward(*args, **kwargs)
    with changing() as changes:
        mode = Inside(visit, caches)
        active.append(mode)
        changes.enter(mode)
        try:
            return forward(*args, **kwargs)
        finally:
            active.pop()


def unobserved(
    is_own: Callable[[], bool],
    call: Callable[..., Any],
    active: list[Inside],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a module inside of such a forward; its functions are its own.

    Args:
        is_own: as of `observed`.
        call: calls the module.
        active: as of `observed`.
        args: what the module is called with.
        kwargs: its keyword arguments.
    """
    if not active or not is_own():
        return call(*args, **kwargs)
    mode = active[-1]
    mode.depth += 1
    try:
        return call(*args, **kwargs)
    finally:
        mode.depth -= 1


def called_at_its_places(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    pass_on: Callable[[Kind, Any], Any],
) -> Any:
    """Calls a torch function. Its arguments and its result pass three places.

    Args:
        function: the function.
        args: what it is called with.
        kwargs: its keyword arguments.
        pass_on: is given the value that passes each place, and returns the one to stand there.
    """
    args, kwargs = pass_on("inputs", (args, kwargs))
    if args:
        args = (pass_on("input", args[0]), *args[1:])
    elif kwargs:
        first = next(iter(kwargs))
        kwargs = {**kwargs, first: pass_on("input", kwargs[first])}
    return pass_on("output", function(*args, **kwargs))


def returns_tensors(value: Any) -> bool:
    """Returns whether a function's result is a tensor, or a tuple with one."""
    if isinstance(value, tuple | list):
        return any(map(returns_tensors, cast("tuple[Any, ...]", value)))
    return isinstance(value, torch.Tensor)
