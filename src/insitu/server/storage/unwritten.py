"""Changes that the store had no room for: they are made as soon as it has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from insitu.server.storage.data_folder import StorageError


class Unwritten:
    """Makes changes to the store, in their order, as soon as the disk has room for them.

    An engine that has ended a job must not wait for that, and the job must not be lost. If this
    process ends before, the job is run again.
    """

    def __init__(self) -> None:
        self._left: deque[Callable[[], object]] = deque()

    def __len__(self) -> int:
        return len(self._left)

    def write(self, change: Callable[[], object]) -> None:
        """Makes a change now, or when there is room.

        Args:
            change: makes it. It is called again if it raises a `StorageError`, so what it has
                done before it does not do twice.
        """
        self._left.append(change)
        if len(self._left) == 1:
            self.again()

    def again(self) -> bool:
        """Tries again, and returns whether everything is written."""
        while self._left:
            try:
                self._left[0]()
            except StorageError:
                return False
            except BaseException:
                self._left.popleft()
                raise
            self._left.popleft()
        return True
