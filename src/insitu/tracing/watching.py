"""Who is told of blocks and sessions as they run: nobody, unless somebody asks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from insitu.tracing.block import Block
    from insitu.tracing.session import Session


class Watcher(Protocol):
    """Is told of blocks and sessions of this context."""

    def begins(self, block: Block | Session) -> None:
        """Is told of what is about to run. It has ended, so that it has a `job`."""
        ...

    def ended(self, block: Block | Session, failure: BaseException | None) -> None:
        """Is told of what has run, and of what it raised."""
        ...


watcher: ContextVar[Watcher | None] = ContextVar("insitu_watcher", default=None)
"""Who is told."""
