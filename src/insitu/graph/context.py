"""Contexts around recorded lines: `torch.no_grad()`, `torch.autocast(...)` and their like.

A block as a whole runs in the context that it stands in. A context around some of its lines holds
for the operations that were recorded there, whenever they run: the graph keeps it by the node.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled
# One question for all kinds of devices.
is_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType]

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
    """

    grad: bool = True
    casts: tuple[tuple[str, torch.dtype | None], ...] = ()


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


def difference(grad: bool, casts: Casts) -> Context | None:
    """Returns how the context of the running line differs from that of its block.

    Inside of `torch.no_grad()` as a whole, a block's lines are differentiated all the same if it
    has a backward pass, so that only what switches autograd off makes a difference.

    Args:
        grad: whether autograd was on where the block began.
        casts: where autocast was enabled there.

    Returns:
        The difference, None if there is none.
    """
    now = enabled_casts()
    off = grad and not is_grad_enabled()
    if now == casts:
        return _NO_GRAD if off else None
    changed = [
        (device, now.get(device)) for device in DEVICES if now.get(device) is not casts.get(device)
    ]
    return Context(not off, tuple(changed))


@contextmanager
def entered(context: Context | None) -> Generator[None, None, None]:
    """Enters a context for the time of its block; None changes nothing.

    Args:
        context: as `difference` has found it.
    """
    if context is None:
        yield
        return
    with ExitStack() as stack:
        if not context.grad:
            stack.enter_context(torch.no_grad())
        _cast(stack, dict(context.casts))
        yield


@contextmanager
def casting(casts: Casts) -> Generator[None, None, None]:
    """Enables autocast just where it was enabled once, for the time of its block.

    Args:
        casts: as `enabled_casts` has found them.
    """
    now = enabled_casts()
    if now == casts:
        yield
        return
    with ExitStack() as stack:
        _cast(stack, {device: casts.get(device) for device in {**now, **casts}})
        yield


def _cast(stack: ExitStack, casts: Mapping[str, torch.dtype | None]) -> None:
    for device, dtype in casts.items():
        enabled = dtype is not None
        stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))


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


def settings(context: Context) -> list[int]:
    """Returns a context as numbers.

    Args:
        context: the context.
    """
    off = [] if context.grad else [0]
    return off + [_SETTINGS.index(cast) for cast in context.casts]


def context_of(numbers: list[int]) -> Context:
    """Returns the context that numbers stand for.

    Args:
        numbers: as `settings` gives them.

    Raises:
        ValueError: if one of them stands for nothing, or is there twice.
    """
    if len(set(numbers)) < len(numbers) or max(numbers) >= len(_SETTINGS):
        raise ValueError(numbers)
    casts = tuple(cast for cast in map(_SETTINGS.__getitem__, numbers) if cast is not None)
    if len(dict(casts)) < len(casts):
        raise ValueError(numbers)
    return Context(0 not in numbers, casts)
