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
    """Who may use a module: a context manager that waits for it, and has it in use.

    Entering it raises a `BlockError` if the module is in use already by the same thread: a block
    was run from inside another's run.

    Attributes:
        lock: held by the thread that uses the module.
        finding_out: whether the run is one of the library's own, which may lead to others.
    """

    __slots__ = ("_running", "finding_out", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.finding_out = False
        self._running = False

    def __enter__(self) -> None:
        self.lock.acquire()
        if self._running:  # by this thread, which has the lock
            self.lock.release()
            raise BlockError(
                "This model is running already, in this thread: a block cannot run it from inside "
                "its own run (a hook, a stopping criterion, a streamer)."
            )
        self._running = True

    def __exit__(self, *_: object) -> None:
        self._running = False
        self.lock.release()


_registry_lock = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Exclusive] = WeakKeyDictionary()


def exclusive(module: nn.Module) -> Exclusive:
    """Returns what says who may use a module, the same for every wrapper of it."""
    with _registry_lock:
        return _locks.setdefault(module, Exclusive())
