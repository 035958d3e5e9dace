"""One user of a module at a time.

Hooks and fake parameters sit on the module itself, so two threads that run it at once would see
each other's. Runs of one module therefore wait for each other, also between two wrappers of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from insitu.graph.errors import BlockError


class _Owned:
    __slots__ = ("lock", "owner")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.owner: int | None = None


_registry_lock = threading.Lock()
_owned: WeakKeyDictionary[nn.Module, _Owned] = WeakKeyDictionary()


@contextmanager
def exclusive(module: nn.Module) -> Iterator[None]:
    """Holds a module for this thread.

    Raises:
        BlockError: if this thread holds it already: a block was run from inside another's run.
    """
    owned = _owned.get(module)
    if owned is None:
        with _registry_lock:
            owned = _owned.setdefault(module, _Owned())
    if owned.owner == threading.get_ident():
        raise BlockError(
            "This model is running already, in this thread: a block cannot run it from inside its "
            "own run (a hook, a stopping criterion, a streamer)."
        )
    with owned.lock:
        owned.owner = threading.get_ident()
        try:
            yield
        finally:
            owned.owner = None
