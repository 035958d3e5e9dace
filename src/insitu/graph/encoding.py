"""What an argument of a recorded operation may be, and how a node holds it.

A node holds plain constants as they are, and references in the place of recorded values. A value
of another block comes in by what it is there: the function of a `cond` captures those from around
it, a later block of a session waits for them, and of what has run they are constants.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from numbers import Number
from typing import Any, cast

import torch

from insitu.graph.cells import Cell
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import NO_KWARGS, Carried, Function, Ref, WeightRef, ref
from insitu.graph.operations import INPUT, SAVE
from insitu.graph.recorded import AnyRecorded, AnyRecording, Recorded, refuse_structure
from insitu.graph.saved import SavedList, SavedTensor
from insitu.graph.shapes import fake_value
from insitu.graph.structure import map_structure

# Constants that a node may hold as they are.
PLAIN = frozenset(
    (
        *(bool, bytes, complex, float, int, str, type(None), type(Ellipsis)),
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


def encode(recording: AnyRecording, value: Any, inputs: list[int], mark: Mark) -> Any:
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
                captured = capture(recording, item, mark)
                if recording.views is not None:
                    captured = recording.views.resolved(captured)
                inputs.append(captured.index)
                return captured
            if item._recording.open and _comes_after(recording, item._recording):
                recording.carried += 1
                return _carried(item, mark)
            return item.result(Location(*mark))
        if type(item) is SavedTensor:
            return item.constant()
        if type(item) is SavedList:
            # Not by `leaf`, which would then refer to itself: a cycle that only the collector ends.
            return encode(recording, item.value, inputs, mark)
        if type(item) in PLAIN or isinstance(item, torch.Tensor | Function | WeightRef):
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


def add_input(branch: AnyRecording, mark: Mark) -> Ref:
    """Adds an input to the function of a `cond` or `fold`.

    Args:
        branch: what records that function.
        mark: the user's line.
    """
    rows = branch.graph.rows
    rows.append((INPUT, (branch.inputs,), NO_KWARGS, (), False, mark))
    branch.inputs += 1
    return ref(len(rows) - 1)


def capture(branch: AnyRecording, value: AnyRecorded, mark: Mark) -> Ref:
    """Returns the input through which such a function gets a value from around it.

    Args:
        branch: what records that function.
        value: a value of what it is used in, or of what is around that.
        mark: the user's line.
    """
    parent = cast("AnyRecording", branch.parent)
    if value._recording is not parent:
        value = Recorded(parent, capture(parent, value, mark))
    source = parent.current(value)
    index = source.index
    if index not in branch.inside:
        branch.inside[index] = add_input(branch, mark)
        branch.captured.append(Recorded(parent, source))
    return branch.inside[index]


def _carried(value: AnyRecorded, mark: Mark) -> Carried:
    """What stands for a value, as it is at this line, in a later block of its session."""
    recording = value._recording
    source, rows = recording.current(value), recording.graph.rows
    cell = Cell()
    recording.saves[len(rows)] = cell
    recording.lent = {**recording.lent, len(rows): cell}
    rows.append((SAVE, (source,), NO_KWARGS, source.inputs, False, mark))
    return Carried(cell, lambda: fake_value(recording, source.index))


def _comes_after(recording: AnyRecording, other: AnyRecording) -> bool:
    """Whether this is a later block of the same session."""
    return (
        recording.session is not None
        and recording.session is other.session
        and recording.order > other.order
    )


def _is_around(recording: AnyRecording, other: AnyRecording) -> bool:
    """Whether this records a function that is used in another recording."""
    parent = recording.parent
    while parent is not None and parent is not other:
        parent = parent.parent
    return parent is other


def described(item: object) -> str:
    """Returns what to call a thing that is no value of a run."""
    kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return f"a value of type {kind}" if not callable(item) else f"a function ({kind})"
