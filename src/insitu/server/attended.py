"""Jobs that somebody waits for: they are given up when the client has vanished.

A client that goes on with something else and fetches results later does not say that it waits, and
its jobs are run whether it is there or not.
"""

from __future__ import annotations

from collections.abc import Callable

LOOK_SECONDS = 5.0
"""Every so many seconds somebody looks who is still there."""

_MOST_LOOKS = 12
"""After so many looks, a minute, a client that was not seen has vanished."""


class Attended:
    """The jobs that somebody waits for.

    It counts looks and not seconds: while the server is stopped nobody can be seen.

    Args:
        is_followed: returns whether somebody follows a job now.
    """

    def __init__(self, is_followed: Callable[[str], bool]) -> None:
        self._is_followed = is_followed
        self._looks: dict[str, int] = {}  # how many times nobody was seen

    def add(self, id: str) -> None:
        """Adds a job whose client says that it waits.

        Args:
            id: the job.
        """
        self._looks[id] = 0

    def seen(self, id: str) -> None:
        """Takes that somebody has asked for a job.

        Args:
            id: the job, also one that nobody has to wait for.
        """
        if id in self._looks:
            self._looks[id] = 0

    def left_alone(self) -> list[str]:
        """Looks once, and returns the jobs whose clients have vanished."""
        for id in self._looks:
            self._looks[id] = 0 if self._is_followed(id) else self._looks[id] + 1
        gone = [id for id, looks in self._looks.items() if looks >= _MOST_LOOKS]
        for id in gone:
            del self._looks[id]
        return gone
