"""Changes for a while: each is noted before it is made, and all are undone in reverse.

An exception may come at any line: Ctrl-C, a signal, a lack of memory. So an undoing may be
repeated: it is begun again if it was interrupted, and does nothing where it was done. A change that
is still there when a block begins, although its function has ended, is undone then.

Nothing here knows what a module is: see `interpose.py` and `keeping.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from threading import get_ident
from types import FrameType
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ABSENT = object()
_SUSPENDED = CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR


class Changes:
    """What was changed, and how it was before.

    Args:
        frame: the function during which the changes hold. It must not be a generator's.

    Attributes:
        frame: that function.
    """

    __slots__ = ("_notes", "frame")

    def __init__(self, frame: FrameType) -> None:
        self._notes: list[Callable[[], object]] = []
        self.frame: FrameType | None = frame
        open_changes[self] = None

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Puts an entry into a table. An entry that somebody else exchanges meanwhile stays.

        Args:
            table: the table, such as `vars(module)`.
            key: the key.
            value: the value that is put there.
        """
        before = table.get(key, ABSENT)
        self._notes.append(partial(_put_back, table, key, value, before))
        table[key] = value

    def afterwards(self, undo: Callable[[], object]) -> None:
        """Notes how a change is undone, before it is made.

        Args:
            undo: undoes it. It may be called twice, and before the change was made.
        """
        self._notes.append(undo)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Enters a context that this thread leaves when the changes are undone.

        A context of torch is not left if an exception comes between its block and its end.

        Args:
            context: the context, which is not told of exceptions. If it is one of ours that is
                written as a generator, that has to take care of itself.
        """
        entered: list[tuple[AbstractContextManager[T], T]] = []
        self._notes.append(partial(_leave, get_ident(), entered))
        entered.append((context, context.__enter__()))
        return entered[0][1]

    def gradients(self, enabled: bool) -> None:
        """Turns autograd on or off in this thread."""
        self._notes.append(partial(_set_gradients, get_ident(), torch.is_grad_enabled()))
        set_grad_enabled(enabled)

    def undo(self) -> None:
        """Undoes all changes, the last first. It may be called again."""
        notes, failed = self._notes, None
        while notes:
            undo = notes[-1]
            try:
                undo()
            except Exception as error:  # it may have come from outside: once more
                failed = failed or error
                with contextlib.suppress(Exception):
                    undo()
            notes.pop()
        open_changes.pop(self, None)
        self.frame = None  # its locals may refer to this
        if failed is not None:
            raise failed


@contextmanager
def changing() -> Generator[Changes, None, None]:
    """Gives what notes changes, and undoes them when its block ends, however it ends.

    It may be entered by a generator that is a context itself: the changes then hold during the
    function that uses that.
    """
    changes = Changes(using_frame())
    try:
        try:
            yield changes
        finally:
            changes.undo()
    finally:
        changes.undo()  # where the first was interrupted


def using_frame() -> FrameType:
    """Returns the function that uses the context in which this is called."""
    frame = sys._getframe(1)
    while frame.f_code.co_flags & _SUSPENDED or _name(frame) == "contextlib":
        assert frame.f_back is not None
        frame = frame.f_back
    return frame


def _name(frame: FrameType) -> Any:
    return frame.f_globals.get("__name__")


def is_running(frame: FrameType | None) -> bool:
    """Returns whether a function has not ended, in any thread.

    Args:
        frame: its frame; None for one of a thread that has gone with a fork.
    """
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:  # as `traceback.clear_frames` asks it
        return True
    return False


def is_below(frame: FrameType | None) -> bool:
    """Returns whether a function is running in this thread, and has led to this call."""
    now: FrameType | None = sys._getframe(1)
    while now is not None and now is not frame:
        now = now.f_back
    return frame is not None and now is frame


def mend() -> None:
    """Undoes what was left changed by functions that have ended."""
    for changes in reversed([*open_changes]):
        if not is_running(changes.frame):
            changes.undo()


def forget_other_threads() -> None:
    """Lets what other threads had changed be mended: after a fork they are not there."""
    for changes in open_changes:
        if not is_below(changes.frame):
            changes.frame = None


open_changes: dict[Changes, None] = {}
"""The changes that are not undone, in the order in which they were begun."""

# What `torch.no_grad()` and `torch.enable_grad()` come down to, without the objects that it takes
# to get there.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Brings a table back to what it was. Other threads may be reading what has not changed.

    Args:
        now: the table.
        before: a copy of it.
    """
    for key in [key for key in now if key not in before]:
        now.pop(key, None)
    for key, value in before.items():
        if now.get(key, ABSENT) is not value:
            now[key] = value
    if list(now) != list(before):
        for key in before:  # the order, with no moment at which an entry is not there
            move_to_end(now, key)


def move_to_end(table: dict[Any, Any], key: Any) -> None:
    """Makes an entry of a table its last."""
    move = getattr(table, "move_to_end", None)  # torch's tables are ordered dictionaries
    if move is None:
        table[key] = table.pop(key)
    else:
        move(key)


def _put_back(table: dict[Any, Any], key: Any, value: Any, before: Any) -> None:
    if table.get(key, ABSENT) is not value:
        return
    if before is ABSENT:
        table.pop(key, None)
    else:
        table[key] = before


def _leave(thread: int, entered: list[tuple[AbstractContextManager[Any], Any]]) -> None:
    if get_ident() == thread and entered:
        entered.pop()[0].__exit__(None, None, None)  # one line: it is left once


def _set_gradients(thread: int, enabled: bool) -> None:
    if get_ident() == thread:
        set_grad_enabled(enabled)
