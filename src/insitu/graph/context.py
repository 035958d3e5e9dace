"""Contexts around recorded lines: `torch.no_grad()`, `torch.autocast(...)`, a default dtype.

A block as a whole runs in the context that it stands in. A context around some of its lines holds
for the operations that were recorded there, whenever they run: the graph keeps it by the node.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import Function as AutogradFunction

from insitu.graph.changes import changing
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
is_inference_mode_enabled: Callable[[], bool] = torch.is_inference_mode_enabled
default_dtype: Callable[[], torch.dtype] = torch.get_default_dtype
# One question for all kinds of devices.
is_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

_APPLY: Any = inspect.getattr_static(AutogradFunction, "apply")  # in Python; in C from 2.14 on


def apply_in_torch(cls: type[AutogradFunction], *args: Any, **kwargs: Any) -> Any:
    """PyTorch's own `torch.autograd.Function.apply`, before which `before_torch.py` stands.

    Args:
        cls: the function.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    return _APPLY.__get__(None, cls)(*args, **kwargs)


_APPLYING = (apply_in_torch.__code__, getattr(getattr(_APPLY, "__func__", None), "__code__", None))
"""What runs while torch applies a function, also where its `apply` was taken before."""

DEVICES = ("cpu", "cuda", "mps", "xpu")
"""The kinds of devices whose autocast is looked at."""

Casts = Mapping[str, torch.dtype]
"""The dtype of autocast on each kind of device on which it is enabled."""

NO_CASTS: Casts = {}


class Context(NamedTuple):
    """What differs around a node from what its block runs in.

    Attributes:
        grad: whether autograd records the operation where it records the run.
        casts: the dtype of autocast by the kind of device, None where it is disabled.
        dtype: the default dtype, None if it is that of the block.
    """

    grad: bool = True
    casts: tuple[tuple[str, torch.dtype | None], ...] = ()
    dtype: torch.dtype | None = None


_NO_GRAD = Context(grad=False)


def enabled_casts() -> Casts:
    """Returns where autocast is enabled now, and with which dtypes."""
    if not is_autocast_enabled():
        return NO_CASTS
    return {
        device: torch.get_autocast_dtype(device)
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    }


def difference(grad: bool, casts: Casts, dtype: torch.dtype) -> Context | None:
    """Returns how the context of the running line differs from that of its block.

    Inside of `torch.no_grad()` as a whole, a block's lines are differentiated all the same if it
    has a backward pass, so that only what switches autograd off makes a difference.

    Args:
        grad: whether autograd was on where the block began.
        casts: where autocast was enabled there.
        dtype: the default dtype there.

    Returns:
        The difference, None if there is none.
    """
    now = enabled_casts()
    off = grad and not is_grad_enabled()
    other = None if default_dtype() is dtype else default_dtype()
    if now == casts and other is None:
        return _NO_GRAD if off else None
    changed = [
        (device, now.get(device)) for device in DEVICES if now.get(device) is not casts.get(device)
    ]
    return Context(not off, tuple(changed), other)


@contextmanager
def entered(context: Context | None) -> Generator[None, None, None]:
    """Enters a context for the time of its block; None changes nothing.

    Args:
        context: as `difference` has found it.
    """
    if context is None:
        yield
        return
    with changing() as changes:
        if not context.grad:
            changes.gradients(False)
        for device, dtype in context.casts:
            changes.enter(torch.autocast(device, dtype=dtype, enabled=dtype is not None))
        if context.dtype is not None:
            changes.afterwards(partial(torch.set_default_dtype, default_dtype()))
            torch.set_default_dtype(context.dtype)
        yield


@contextmanager
def as_begun(casts: Casts, dtype: torch.dtype) -> Generator[None, None, None]:
    """Sets autocast and the default dtype to what they were once, for the time of its block.

    Args:
        casts: as `enabled_casts` has found them.
        dtype: the default dtype.
    """
    now = enabled_casts()
    other = None if default_dtype() is dtype else dtype
    if now == casts and other is None:
        yield
        return
    changed = {device: casts.get(device) for device in {**now, **casts}} if now != casts else {}
    with entered(Context(casts=tuple(changed.items()), dtype=other)):
        yield


def within(context: Context, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is called in a context.

    Args:
        context: the context.
        function: the function.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        with entered(context):
            return function(*args, **kwargs)

    return called


# Contexts as numbers, for the wire: one number for each thing that differs.
_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SETTINGS: tuple[tuple[str, torch.dtype | None] | None, ...] = (
    None,
    *((device, dtype) for device in DEVICES for dtype in _DTYPES),
)
_DEFAULTS = _DTYPES[1:]


def settings(context: Context) -> list[int]:
    """Returns a context as numbers.

    Args:
        context: the context.
    """
    found = [] if context.grad else [0]
    found += [_SETTINGS.index(cast) for cast in context.casts]
    if context.dtype is not None:
        found.append(len(_SETTINGS) + _DEFAULTS.index(context.dtype))
    return found


def context_of(numbers: list[int]) -> Context:
    """Returns the context that numbers stand for.

    Args:
        numbers: as `settings` gives them.

    Raises:
        ValueError: if one of them stands for nothing, or is there twice.
    """
    first = len(_SETTINGS)
    settings = [_SETTINGS[number] for number in numbers if number < first]
    defaults = [number - first for number in numbers if number >= first]
    casts = tuple(cast for cast in settings if cast is not None)
    if len(set(numbers)) < len(numbers) or len(dict(casts)) < len(casts) or min(numbers) < 0:
        raise ValueError(numbers)
    if len(defaults) > 1 or max(defaults, default=0) >= len(_DEFAULTS):
        raise ValueError(numbers)
    dtype = _DEFAULTS[defaults[0]] if defaults else None
    return Context(0 not in numbers, casts, dtype)


def refuse_inside_forward(line: Mark) -> None:
    """Raises if a line is recorded while torch runs the forward of an `autograd.Function`.

    That happens where the value came in by another way than as an argument. Lines that were
    recorded then would lose the function's own backward.

    Args:
        line: the user's line.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code in _APPLYING:
            name = frame.f_locals["cls"].__qualname__
            raise OperationError(
                f"The own backward of {name} would be lost: its forward uses a value of the run "
                "that it is not given as an argument, or its `apply` was taken before insitu was "
                f"imported. Call `{name}.apply(...)`, by that name, with all values of the run "
                "that it needs.",
                Location(*line),
            )
        frame = frame.f_back
