"""One user of a module at a time.

Hooks and fake parameters sit on the module itself, so two threads that run it at once would see
each other's. Runs of one module therefore wait for each other, also between two wrappers of it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn
from weakref import WeakKeyDictionary

from torch import nn

from insitu.graph.errors import BlockError


class Exclusive:
    """Who may use a module.

    Attributes:
        lock: held by the thread that uses the module.
        running: whether it is in use. A thread that has the lock and finds this set is inside a
            run of its own.
    """

    __slots__ = ("lock", "running")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.running = False

    def refuse(self) -> NoReturn:
        """Raises, where the thread that has the lock finds the module in use."""
        raise BlockError(
            "This model is running already, in this thread: a block cannot run it from inside "
            "its own run (a hook, a stopping criterion, a streamer)."
        )

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Waits for the module, and has it in use.

        Raises:
            BlockError: if it is in use already: a block was run from inside another's run.
        """
        with self.lock:
            if self.running:
                self.refuse()
            self.running = True
            try:
                yield
            finally:
                self.running = False


_registry_lock = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Exclusive] = WeakKeyDictionary()


def exclusive(module: nn.Module) -> Exclusive:
    """Returns what says who may use a module, the same for every wrapper of it."""
    with _registry_lock:
        return _locks.setdefault(module, Exclusive())
