"""Where a run puts a saved value, and what stands there until then."""

from __future__ import annotations

from typing import Any, Protocol


class Missing:
    """Stands in a cell that has no value, and says why."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


WAITING = Missing("its run failed.")


class Cell:
    """Where a saved value is put.

    Attributes:
        content: the value once the run has put it here; until then, and after a failure,
            a `Missing`.
    """

    content: Any = WAITING  # of the class: a cell without an `__init__` is made much faster

    @property
    def _content(self) -> Any:
        return self.content

    def _put(self, content: Any) -> None:
        self.content = content


class Holder(Protocol):
    """Where a run puts a saved value: a `Cell`, or what `.save()` returned."""

    @property
    def _content(self) -> Any: ...

    def _put(self, content: Any) -> None: ...
