"""Which block a line of code stands in.

A block is current for the code that its `with` statement encloses, and for functions called from
there. A `ContextVar` alone cannot say that: a generator that is suspended inside a `with` block
leaves the variable set for its caller. So each open block also knows the frame that its `with`
statement stands in, and it is current only while that frame is on the stack.
"""

from __future__ import annotations

import contextlib
import inspect
from contextvars import ContextVar
from sys import _getframe
from threading import get_ident
from types import FrameType

from insitu.graph.location import Mark, mark


class Scope:
    """Something with a `with` statement, in which the sites of a model have a meaning.

    Attributes:
        model: that model.
    """

    __slots__ = ("__weakref__", "_owner", "_thread", "model")

    model: object
    _owner: FrameType | None
    _thread: int

    def enter(self, frame: FrameType) -> None:
        """Opens the scope.

        Args:
            frame: the frame whose `with` statement this is.
        """
        if frame.f_code.co_flags & _GENERATOR:
            frame = _entering_frame(frame)
        self._owner = frame
        self._thread = get_ident()
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        """Closes it if it is open, from whatever frame, thread or context."""
        if self._owner is None:
            return
        self._owner = None
        scopes = _open.get()
        if len(scopes) == 1 and scopes[0] is self:
            _open.set(())
        else:
            _open.set(tuple(scope for scope in scopes if scope._owner is not None))


_open: ContextVar[tuple[Scope, ...]] = ContextVar("insitu_open_scopes", default=())


def innermost(model: object, depth: int) -> tuple[Scope | None, Mark]:
    """Returns the innermost open scope of a model around the user's running line, and that line.

    Args:
        model: the model.
        depth: how many frames between are ours at least.
    """
    frame = _getframe(depth)
    scopes = _open.get()
    if scopes:
        last = scopes[-1]
        owner = last._owner
        if last.model is model:
            if frame is owner:  # nearly always
                return last, (frame.f_code, frame.f_lasti)
            if frame.f_back is owner:  # a comprehension, or a function called from the block
                return last, mark(depth + 1)
    line = mark(depth + 1)
    outer: FrameType | None = frame
    while outer is not None:
        for scope in reversed(scopes):
            if scope._owner is outer and scope.model is model:
                return scope, line
        outer = outer.f_back
    # Entered by a function that has returned, such as the `__enter__` of a user's own class: only
    # what can be suspended may be neither running nor done.
    for scope in reversed(scopes):
        owner = scope._owner
        done = owner is not None and not owner.f_code.co_flags & _SUSPENDABLE
        if done and scope.model is model and scope._thread == get_ident():
            return scope, line
    return None, line


def _entering_frame(frame: FrameType) -> FrameType:
    """The frame that a `with` statement in a generator acts for.

    That is the generator itself, unless `contextlib` drives it: such a function only wraps the
    block, and the code inside is that of whoever entered the context manager.
    """
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
_SUSPENDABLE = _GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
