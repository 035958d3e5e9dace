"""How long something is tried again that has failed on the way."""

from __future__ import annotations

import random
import time

_FIRST = 0.1
_LONGEST = 5.0
_DICE = random.SystemRandom()  # the user's seeds are not touched


class Retries:
    """Waits between one attempt and the next, longer each time.

    Args:
        seconds: how long to go on, from the first failure on.

    Attributes:
        made: how many attempts followed the first, since the last that went well.
        said: whether somebody was told that it is tried again.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.said = False
        self.went_well()

    @property
    def left(self) -> float:
        """For how many seconds it is tried again."""
        return self._seconds if self._end is None else max(self._end - now(), 0.0)

    @property
    def waited(self) -> float:
        """For how many seconds it was tried, since the last that went well."""
        return self._seconds - self.left

    def went_well(self) -> None:
        """Begins anew: what fails from now on is another failure."""
        self.made = 0
        self._end: float | None = None

    def another(self, after: float = 0.0) -> bool:
        """Waits, and returns whether to try again.

        Args:
            after: how many seconds the server has asked to wait. If that is too long, it does not
                wait.
        """
        backoff = min(_FIRST * 2 ** min(self.made, 10), _LONGEST) * _DICE.uniform(0.5, 1.0)
        wait = max(after, backoff)
        if self._end is None:
            self._end = now() + self._seconds
        if now() + wait > self._end:
            return False
        self.made += 1
        pause(wait)
        return True


def now() -> float:
    """Returns the seconds on a clock that only goes forward."""
    return time.monotonic()


def pause(seconds: float) -> None:
    """Waits.

    Args:
        seconds: how long.
    """
    time.sleep(seconds)
