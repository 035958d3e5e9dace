"""Who is told of blocks and sessions as they run: nobody, unless somebody asks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject
    from insitu.engine.job import Job


class Running(Protocol):
    """A block, or a session."""

    @property
    def model(self) -> Subject:
        """The model that runs."""
        ...

    @property
    def job(self) -> Job:
        """What runs, as data."""
        ...


class Watcher(Protocol):
    """Is told of the blocks and sessions of a context."""

    def begins(self, running: Running) -> None:
        """Is told of a run that is about to begin. Its lines have ended, so that it has a job."""
        ...

    def ended(self, running: Running, failure: BaseException | None) -> None:
        """Is told of what has run, and of what it raised."""
        ...


watcher: ContextVar[Watcher | None] = ContextVar("insitu_watcher", default=None)
"""Who is told."""
