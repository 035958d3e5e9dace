"""Who waits for news of jobs, in this process: streams of events, and requests that wait."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager


class News:
    """Wakes those who wait for something to happen to a job."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Event]] = defaultdict(set)

    def tell(self, id: str) -> None:
        """Wakes those who wait for news of a job.

        Args:
            id: the job.
        """
        for event in self._waiting.get(id, ()):
            event.set()

    def is_followed(self, id: str) -> bool:
        """Returns whether somebody waits for news of a job.

        Args:
            id: the job.
        """
        return id in self._waiting

    @contextmanager
    def of(self, id: str) -> Generator[asyncio.Event]:
        """Gives an event that is set when there is news of a job.

        Args:
            id: the job.
        """
        event = asyncio.Event()
        self._waiting[id].add(event)
        try:
            yield event
        finally:
            events = self._waiting[id]
            events.discard(event)
            if not events:
                del self._waiting[id]
