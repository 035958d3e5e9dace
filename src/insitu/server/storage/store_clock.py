"""The clock of a store: it does not jump, even if the clock of the machine does.

A server looks at the clock of the machine once, when it starts. From then on it adds the seconds
of a clock that nobody can set. So a clock that is put forward ends no lease and deletes no
results, and one that is put back lets none of them live for longer.

Between two servers on one folder the clock of the machine may have been moved too, and nothing
tells that from a server that was off for a while. Hence time in which no server runs does not
count: `SqliteStore` moves all that is to come by the time that has passed since the last one.

The clock of the machine counts again for what people read, such as when a job was made, from the
next start. A machine that sleeps is late by that time until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class StoreClock:
    """Returns the time in seconds since 1970 when it is called.

    Args:
        wall: the clock of the machine, which is looked at once.
        steady: a clock that only goes forward, from any moment.
    """

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steady = steady
        self._ahead = wall() - steady()

    def __call__(self) -> float:
        """Returns the time."""
        return self._ahead + self._steady()
