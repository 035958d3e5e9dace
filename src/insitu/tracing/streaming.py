"""A block that tells of the tokens of its generation as they come."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from insitu.engine.events import Event, TokensChosen
from insitu.engine.seams import around
from insitu.tracing.tracer import Tracer

if TYPE_CHECKING:
    from insitu.tracing.block import Block


class StreamingTracer(Tracer):
    """A block that generates, and tells a function of each step's tokens, here or on a server.

    Args:
        block: the block.
        on_token: the function.
    """

    def __init__(self, block: Block, on_token: Callable[[TokensChosen], object]) -> None:
        super().__init__(block)
        self._on_token = on_token

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with around(events=self._told):
            super().__exit__(kind, error, traceback)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with around(events=self._told):
            await super().__aexit__(kind, error, traceback)

    def _told(self, event: Event) -> None:
        if isinstance(event, TokensChosen):
            self._on_token(event)
