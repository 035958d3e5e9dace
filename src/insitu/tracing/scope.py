"""Which block a line of code stands in.

A block is current for the code that its `with` statement encloses, and for functions called from
there. A `ContextVar` alone cannot say that: a generator that is suspended inside a `with` block
leaves the variable set for its caller. So each open block also knows the frame that its `with`
statement stands in, and it is current only while that frame is on the stack.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import TypeVar

from insitu.graph.location import user_frame


class Scope:
    """Something with a `with` statement: open from `enter` to `leave`."""

    _owner: FrameType | None = None

    def enter(self) -> None:
        """Opens the scope for the frame whose `with` statement this is."""
        self._owner = _owner_frame(user_frame(3))
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        """Closes it, also from another frame, thread or context than the one that opened it."""
        self._owner = None
        _open.set(tuple(scope for scope in _open.get() if scope._owner is not None))

    @property
    def is_open(self) -> bool:
        """Whether the `with` statement is being executed."""
        return self._owner is not None


_open: ContextVar[tuple[Scope, ...]] = ContextVar("insitu_open_scopes", default=())

AnyScope = TypeVar("AnyScope", bound=Scope)


def innermost(kind: type[AnyScope], suits: Callable[[AnyScope], bool]) -> AnyScope | None:
    """Returns the innermost scope of a kind around the running line that suits, or None."""
    scopes = [s for s in reversed(_open.get()) if isinstance(s, kind) and suits(s)]
    if not scopes:
        return None
    frame = user_frame(3)
    while frame is not None:
        for scope in scopes:
            if scope._owner is frame:
                return scope
        frame = frame.f_back
    return None


def _owner_frame(frame: FrameType) -> FrameType:
    """The frame that a `with` statement in this frame acts for.

    That is the frame itself, but for a generator that `contextlib` drives: such a function only
    wraps the block, and the code inside is that of whoever entered the context manager.
    """
    generator = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
    while (
        frame.f_code.co_flags & generator
        and frame.f_back is not None
        and frame.f_back.f_code.co_filename == contextlib.__file__
    ):
        caller = frame.f_back
        while caller.f_back is not None and caller.f_code.co_filename == contextlib.__file__:
            caller = caller.f_back
        frame = caller
    return frame
