"""A saved value that turned out to be no tensor: what `.save()` returned holds it.

That is not known where `.save()` is called, and what that returns is of a class of tensors for
good. To Python it is of the value's class: `isinstance(x, tuple)` holds.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import json
from sys import _getframe
from types import CodeType, FrameType
from typing import Any, cast

from insitu.graph.dispatch import ENDED
from insitu.graph.errors import OperationError
from insitu.graph.location import here
from insitu.graph.node import ref
from insitu.graph.recorded import AnyRecorded

# What the encoder asks for what it cannot write.
_NO_JSON: CodeType = json.JSONEncoder.default.__code__


def refuse_json() -> None:
    """Raises where JSON's encoder asks for the class of a saved value, to say what it cannot write.

    Its C code takes nothing for a number by its `__class__`, and its message would be that an
    `int` is not serialisable.

    Raises:
        OperationError: with the line to write.
    """
    frame: FrameType | None = _getframe(2)
    if frame.f_code.co_name == "__getattribute__":  # of the saved value's own
        frame = frame.f_back
    if frame is not None and frame.f_code is _NO_JSON:
        raise OperationError(
            "A saved value is written as JSON by its plain value: `json.dumps(x.value)`.", here()
        )


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
        refuse_json()
        return cast(Any, type(self._held))
