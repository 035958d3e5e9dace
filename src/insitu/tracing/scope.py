"""Which block a line of code stands in.

A block is current for the code that its `with` statement encloses, and for functions called from
there. A `ContextVar` alone cannot say that: a generator that is suspended inside a `with` block
leaves the variable set for its caller. So each open block also knows the frame that its `with`
statement stands in, and it is current only while that frame is on the stack.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import TypeVar

from insitu.graph.location import user_frame


class Scope:
    """Something with a `with` statement: open from `enter` to `leave`."""

    __slots__ = ("_owner",)

    def __init__(self) -> None:
        self._owner: FrameType | None = None

    def enter(self, owner: FrameType | None = None) -> None:
        """Opens the scope for the frame whose `with` statement this is.

        Args:
            owner: that frame; None for the one on the stack.
        """
        self._owner = owner or owner_frame(3)
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        """Closes it, also from another frame, thread or context than the one that opened it."""
        self._owner = None
        scopes = _open.get()
        if len(scopes) == 1 and scopes[0] is self:
            _open.set(())
        else:
            _open.set(tuple(scope for scope in scopes if scope._owner is not None))


_open: ContextVar[tuple[Scope, ...]] = ContextVar("insitu_open_scopes", default=())

AnyScope = TypeVar("AnyScope", bound=Scope)


def innermost(kind: type[AnyScope], suits: Callable[[AnyScope], bool]) -> AnyScope | None:
    """Returns the innermost scope of a kind around the running line that suits, or None.

    Args:
        kind: the class of scope.
        suits: further says which.
    """
    scopes = _open.get()
    if not scopes:
        return None
    frame: FrameType | None = sys._getframe(3)
    last = scopes[-1]
    if last._owner is frame and isinstance(last, kind) and suits(last):
        return last
    while frame is not None:
        for scope in reversed(scopes):
            if scope._owner is frame and isinstance(scope, kind) and suits(scope):
                return scope
        frame = frame.f_back
    return None


def owner_frame(depth: int) -> FrameType:
    """Returns the frame that the user's `with` statement acts for.

    That is the frame it stands in, but for a generator that `contextlib` drives: such a function
    only wraps the block, and the code inside is that of whoever entered the context manager.

    Args:
        depth: how many frames are ours at least.
    """
    frame = user_frame(depth)
    while (
        frame.f_code.co_flags & _GENERATOR
        and frame.f_back is not None
        and frame.f_back.f_code.co_filename == contextlib.__file__
    ):
        caller = frame.f_back
        while caller.f_back is not None and caller.f_code.co_filename == contextlib.__file__:
            caller = caller.f_back
        frame = caller
    return frame


_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
