"""What an argument of a recorded operation may be, and how a node holds it.

A node holds plain constants as they are, and references in the place of recorded values. A value
of another block comes in by what it is there: the function of a `cond` captures those from around
it, a later block of a session waits for them, and of what has run they are constants.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from numbers import Number
from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Function, WeightRef
from insitu.graph.recorded import AnyRecorded, refuse_structure
from insitu.graph.saved import SavedList, SavedTensor
from insitu.graph.structure import map_structure

if TYPE_CHECKING:
    from insitu.graph.recording import Recording

# Constants that a node may hold as they are; bools too, but those are noted down (`Graph.flags`).
PLAIN = frozenset(
    (
        *(bytes, complex, float, int, str, type(None), type(Ellipsis)),
        *(torch.Size, torch.Tensor, torch.device, torch.dtype, torch.layout, torch.memory_format),
        torch.Generator,
    )
)
# What tensors are indexed with: nearly always constants, so they get a short way of their own.
KEYS = frozenset([slice, tuple])


def is_constant(key: Any) -> bool:
    """Whether a slice or a tuple holds nothing but plain constants and slices of them."""
    if type(key) is slice:
        bounds: tuple[Any, ...] = (key.start, key.stop, key.step)
        return PLAIN.issuperset(map(type, bounds))
    for item in key:
        if type(item) not in PLAIN and not (type(item) is slice and is_constant(item)):
            return False
    return True


def encode(recording: Recording, value: Any, inputs: list[int], mark: Mark) -> Any:
    """Returns a value with references in the place of recorded values, also inside containers.

    Args:
        recording: what it becomes an argument in.
        value: recorded values, constants, or containers of both.
        inputs: gets the nodes that are referred to, in their order.
        mark: the user's line.

    Raises:
        OperationError: if it holds anything that cannot be recorded.
        NoValueError: if it holds a value of another block that has none.
    """
    if type(value) is SavedTensor:
        return value.constant()
    if isinstance(value, torch.Tensor) and not isinstance(value, AnyRecorded):
        return value

    def leaf(item: Any) -> Any:
        if isinstance(item, AnyRecorded):
            if item._recording is recording:
                if not item._operand:
                    refuse_structure(item, Location(*mark))
                current = recording.current(item)
                inputs.append(current.index)
                return current
            if recording.parent is not None and _is_around(recording, item._recording):
                captured = recording.capture(item, mark)
                if recording.views is not None:
                    captured = recording.views.resolved(captured)
                inputs.append(captured.index)
                return captured
            if item._recording.open and _comes_after(recording, item._recording):
                recording.carried += 1
                return item._recording.carry(item, mark)
            return item.result(Location(*mark))
        if type(item) is SavedTensor:
            return item.constant()
        if type(item) is SavedList:
            # Not by `leaf`, which would then refer to itself: a cycle that only the collector ends.
            return encode(recording, item.value, inputs, mark)
        if type(item) in PLAIN or isinstance(item, torch.Tensor | Function | WeightRef):
            return item
        if type(item) is bool:
            recording.graph.flags = True
            return item
        if isinstance(item, Number) and hasattr(item, "item"):  # a NumPy scalar
            return cast(Any, item).item()
        if isinstance(item, int | float):
            return item
        if hasattr(item, "__array_interface__"):
            raise OperationError(
                "An array of NumPy cannot be part of a recorded operation: write "
                "`torch.as_tensor(array)` for it.",
                Location(*mark),
            )
        raise OperationError(
            f"{described(item)} cannot be part of a recorded operation: it may use values of "
            "this block, tensors, numbers, strings, dtypes and devices, and tuples, lists, "
            "dictionaries and slices of those.",
            Location(*mark),
        )

    return map_structure(leaf, value)


def _comes_after(recording: Recording, other: Recording) -> bool:
    """Whether this is a later block of the same session."""
    return (
        recording.session is not None
        and recording.session is other.session
        and recording.order > other.order
    )


def _is_around(recording: Recording, other: Recording) -> bool:
    """Whether this records a function that is used in another recording."""
    parent = recording.parent
    while parent is not None and parent is not other:
        parent = parent.parent
    return parent is other


def described(item: object) -> str:
    """Returns what to call a thing that is no value of a run."""
    kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return f"a value of type {kind}" if not callable(item) else f"a function ({kind})"
