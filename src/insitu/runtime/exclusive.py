"""One user of a module at a time.

Hooks and fake parameters sit on the module itself, so two threads that run it at once would see
each other's. Runs of one module therefore wait for each other, also between two wrappers of it.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

from insitu.graph.errors import BlockError


class Exclusive:
    """The lock of one module, which knows the thread that holds it."""

    __slots__ = ("_lock", "_owner")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def __enter__(self) -> None:
        if self._lock.acquire(blocking=False):
            self._owner = threading.get_ident()
            return
        if self._owner == threading.get_ident():
            raise BlockError(
                "This model is running already, in this thread: a block cannot run it from inside "
                "its own run (a hook, a stopping criterion, a streamer)."
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = None
        self._lock.release()


_registry_lock = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Exclusive] = WeakKeyDictionary()


def exclusive(module: nn.Module) -> Exclusive:
    """Returns a context manager that holds a module for this thread.

    Entering it raises a `BlockError` if this thread holds the module already: a block was run
    from inside another's run.
    """
    with _registry_lock:
        return _locks.setdefault(module, Exclusive())
