"""A saved value that turned out to be no tensor: what `.save()` returned holds it.

That is not known where `.save()` is called, and what that returns is of a class of tensors for
good. To Python it is of the value's class: `isinstance(x, tuple)` holds.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any, cast

from insitu.graph.dispatch import ENDED
from insitu.graph.node import ref
from insitu.graph.recorded import AnyRecorded


class HeldValue(AnyRecorded):
    """A value that was saved and is no tensor."""

    __slots__ = ()
    _recording = ENDED  # pyright: ignore[reportAssignmentType]
    _ref = ref(0)  # pyright: ignore[reportAssignmentType]
    _held: Any

    @property
    def _cell(self) -> HeldValue:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    @property
    def _content(self) -> Any:
        return self._held

    def _put(self, content: object) -> None:
        """Does nothing: see `SavedTensor`."""

    @property
    def __class__(self) -> Any:  # pyright: ignore
        return cast(Any, type(self._held))
