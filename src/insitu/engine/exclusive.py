"""One user of a module at a time.

Hooks and fake parameters sit on the module itself, so two threads that run it at once would see
each other's. Runs of one module therefore wait for each other, also between two wrappers of it.

Who has a module is the function that runs it. If that was broken off before it gave the module
back, it has ended all the same: then the module is free, and what was left on it is taken off.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from functools import partial
from sys import _getframe as current_frame
from types import FrameType
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from insitu.engine.interpose import Hooks, remove_hooks
from insitu.graph.changes import (
    Changes,
    forget_other_threads,
    is_below,
    is_running,
    mend,
    open_changes,
)
from insitu.graph.errors import BlockError

_PATIENCE = 0.1  # seconds after which a thread looks whether the one that it waits for has ended


class Exclusive:
    """Who may use a module: a context manager that waits for it, and has it in use.

    Entering it raises a `BlockError` if the module is in use already by the same thread: a block
    was run from inside another's run. No generator may enter it: see `take`.

    Attributes:
        hooks: those that the run in progress has put on the module's parts.
        finding_out: the function that uses the module for a run of the library's own, which may
            lead to others.
    """

    __slots__ = ("__weakref__", "_holder", "_waiting", "finding_out", "hooks")

    def __init__(self) -> None:
        self.hooks: Hooks = {}
        self.finding_out: FrameType | None = None
        # One entry, which is set and taken in one operation of the interpreter: no exception comes
        # between a lock that is taken and the note of who has it.
        self._holder: dict[None, FrameType] = {}
        self._waiting: deque[threading.Lock] = deque()
        _all.add(self)

    def __enter__(self) -> None:
        frame = current_frame(1)
        try:  # as in `take`, without a call more
            if self._holder.setdefault(None, frame) is not frame or self.hooks or open_changes:
                self._take(frame)
        except BaseException:
            self.give_back(frame)
            raise

    def __exit__(self, *_: object) -> None:
        self._holder.clear()
        if self._waiting:
            self._wake()

    def take(self, frame: FrameType) -> None:
        """Waits for the module, and has it in use.

        Args:
            frame: the function that uses it, which is not a generator's. The module counts as
                given back when it has ended.

        Raises:
            BlockError: if this thread uses it.
        """
        try:
            self._take(frame)
        except BaseException:
            self.give_back(frame)
            raise

    def _take(self, frame: FrameType) -> None:
        if self._holder.setdefault(None, frame) is not frame:
            self._wait(frame)
        remove_hooks(self.hooks)  # those that a run has left that was broken off
        mend()

    def take_until(self, changes: Changes) -> None:
        """Has the module in use until changes are undone, for the function that they hold for."""
        frame = changes.frame
        assert frame is not None
        changes.afterwards(partial(self.give_back, frame))
        self.take(frame)

    def find_out(self, changes: Changes) -> None:
        """Notes that the function is a run of the library's own, until changes are undone."""
        changes.afterwards(self._found_out)
        self.finding_out = changes.frame

    def _found_out(self) -> None:
        self.finding_out = None  # a frame keeps all that its function has seen

    def give_back(self, frame: FrameType) -> None:
        """Lets others use the module, if it is this function that uses it."""
        if self._holder.get(None) is frame:
            self.__exit__()

    def leads_to_here(self) -> bool:
        """Returns whether a run of the library's own uses the module and has led to this call."""
        return self.finding_out is not None and self.is_used_here(self.finding_out)

    def is_used_here(self, by: FrameType | None = None) -> bool:
        """Returns whether a function that uses the module has led to this call.

        Args:
            by: the function; None for any.
        """
        holder = self._holder.get(None)
        return holder is not None and by in (None, holder) and is_below(holder)

    def _wait(self, frame: FrameType) -> None:
        gate = threading.Lock()
        gate.acquire()
        self._waiting.append(gate)
        try:
            while (holder := self._holder.setdefault(None, frame)) is not frame:
                if is_below(holder):
                    raise BlockError(
                        "This model is running already, in this thread: a block cannot run it "
                        "from inside its own run (a hook, a stopping criterion, a streamer)."
                    )
                if not is_running(holder):
                    self._free(holder)
                    continue
                if gate.acquire(timeout=_PATIENCE) and gate not in self._waiting:
                    self._waiting.append(gate)
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(gate)

    def _wake(self) -> None:
        with contextlib.suppress(IndexError, RuntimeError):  # another thread was faster
            self._waiting.popleft().release()

    def _free(self, holder: FrameType) -> None:
        """Takes the module from a function that has ended."""
        # Never held for longer than these lines, so one that is held was not given back.
        _freeing.acquire(timeout=_PATIENCE)
        try:
            if self._holder.get(None) is holder:
                self._holder.clear()
        finally:
            with contextlib.suppress(RuntimeError):
                _freeing.release()

    def forget_other_threads(self) -> None:
        """Frees the module in a forked process, in which its user is not there."""
        self._waiting.clear()
        holder = self._holder.get(None)
        if holder is not None and not is_below(holder):
            self._holder.clear()


_freeing = threading.Lock()
_all: WeakSet[Exclusive] = WeakSet()
_locks: WeakKeyDictionary[nn.Module, Exclusive] = WeakKeyDictionary()


def exclusive(module: nn.Module) -> Exclusive:
    """Returns what says who may use a module, the same for every wrapper of it."""
    return _locks.setdefault(module, Exclusive())


def _begin_fork_anew() -> None:
    """Lets a forked process use models that other threads of its parent were using."""
    global _freeing
    _freeing = threading.Lock()
    for use in [*_all]:
        use.forget_other_threads()
    forget_other_threads()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_fork_anew)
