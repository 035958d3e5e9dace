"""How a line becomes a node: what an argument may be, and how the node holds it.

A node holds plain constants as they are, and references in the place of recorded values. A value of
another block comes in by what it is there. The function of a `cond` captures those from around it,
a later block of a session waits for them, and values of a block that has run are constants.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any, cast

import torch

from insitu.graph.cells import Cell
from insitu.graph.context import default_dtype, is_autocast_enabled, is_grad_enabled
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import (
    NO_KWARGS,
    Carried,
    Function,
    ModuleRef,
    Ref,
    Subgraph,
    WeightRef,
    ref,
    table_of,
)
from insitu.graph.operations import GETITEM, INPUT, SAVE, Operation
from insitu.graph.read_only import refuse_write, writable
from insitu.graph.recorded import AnyRecorded, Recorded, refuse_structure
from insitu.graph.recording import Recording
from insitu.graph.saved import SavedList, SavedTensor
from insitu.graph.shapes import fake_value
from insitu.graph.structure import CONSTANTS, map_structure
from insitu.graph.written_arguments import WRITING, written_arguments

# Constants that a node may hold as they are. A tensor may change before the run: see `hold`.
PLAIN = frozenset((*CONSTANTS, torch.Generator)) - {torch.Tensor}
# What tensors are indexed with: nearly always constants, so they get a short way of their own.
KEYS = frozenset([slice, tuple])
_TENSORS = frozenset([torch.Tensor, torch.nn.Parameter])
_NAMED = (Function, ModuleRef, Subgraph)


def is_constant(key: Any) -> bool:
    """Whether a slice or a tuple holds nothing but plain constants and slices of them."""
    if type(key) is slice:
        bounds: tuple[Any, ...] = (key.start, key.stop, key.step)
        return PLAIN.issuperset(map(type, bounds))
    for item in key:
        if type(item) not in PLAIN and not (type(item) is slice and is_constant(item)):
            return False
    return True


def add_node(
    recording: Recording,
    operation: Operation,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mark: Mark,
) -> Ref:
    """Records an operation on values and constants.

    Args:
        recording: where it is recorded.
        operation: an entry of the registry.
        args: its arguments: recorded values, constants, or containers of both.
        kwargs: its keyword arguments, of the same kinds.
        mark: the user's line.

    Raises:
        OperationError: if an argument is of a kind that cannot be recorded, or asks for a write in
            place.
        NoValueError: if an argument belongs to another block and has no value.
    """
    if kwargs and (kwargs.get("out") is not None or kwargs.get("inplace")):
        raise OperationError(
            f"{operation.name} cannot write into one of its arguments here: leave out "
            "`out=` and `inplace=` and use what it returns.",
            Location(*mark),
        )
    count = len(args)
    value = args[0] if args else None
    other = args[1] if count == 2 else None
    kind = type(other)  # pyright: ignore[reportUnknownVariableType]
    if (  # most are a value, an operator and a constant, or less
        (kind in PLAIN or (kind in KEYS and is_constant(other)))
        and count <= 2
        and isinstance(value, AnyRecorded)
        and value._recording is recording
        and recording.views is None
        and (value._operand or operation is GETITEM)
        and (not kwargs or PLAIN.issuperset(map(type, kwargs.values())))
    ):
        source = value._ref
        args, inputs, nested = (source, *args[1:]), source.inputs, False
    else:
        tuples = operation is GETITEM
        if operation in WRITING:
            for one in written_arguments(operation, args, kwargs)[0]:
                refuse_write(one)
                if type(one) is torch.Tensor:  # such as running statistics
                    recording.hold(one, mark, written=True)
        args, kwargs, inputs, nested = encoded(recording, args, kwargs, mark, tuples)
    rows = recording.graph.rows
    index = len(rows)
    rows.append((operation, args, kwargs, inputs, nested, mark))
    if (
        is_grad_enabled() is not recording.grads
        or default_dtype() is not recording.dtype
        or (operation.casts and (is_autocast_enabled() or recording.casts))
    ):
        recording.note_context(operation, index)
    return ref(index)


def encoded(
    recording: Recording,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    mark: Mark,
    tuples: bool = False,
) -> tuple[tuple[Any, ...], Mapping[str, Any], tuple[int, ...], bool]:
    """Returns arguments as a node holds them.

    Args:
        recording: where they are recorded.
        args: positional arguments.
        kwargs: keyword arguments.
        mark: the user's line.
        tuples: whether an argument may be a value that is known to be a tuple.

    Returns:
        The arguments, the nodes that they refer to, and whether anything but an argument itself is
        known in the run only: `args`, `kwargs`, `inputs` and `nested` of a `Node`.
    """
    inputs: list[int] = []
    made: list[Any] = []
    nested, carried = False, recording.carried
    for arg in args:
        kind = type(arg)  # pyright: ignore[reportUnknownVariableType]
        if kind in PLAIN or (kind in KEYS and is_constant(arg)):
            made.append(arg)
        elif kind in _TENSORS:
            made.append(recording.hold(arg, mark))
        elif kind in _NAMED:
            made.append(arg)
            nested = True
        elif issubclass(kind, AnyRecorded) and arg._recording is recording:
            if not (arg._operand or tuples):
                refuse_structure(arg, Location(*mark))
            source = arg._ref if recording.views is None else recording.views.resolved(arg._ref)
            inputs.append(source.index)
            made.append(source)
        else:
            before = len(inputs)
            made.append(encode(recording, arg, inputs, mark))
            nested = nested or (len(inputs) > before and type(made[-1]) is not Ref)
    if kwargs:
        before = len(inputs)
        kwargs = {
            key: arg if type(arg) in PLAIN else encode(recording, arg, inputs, mark)
            for key, arg in kwargs.items()
        }
        nested = nested or len(inputs) > before
    return tuple(made), kwargs, tuple(inputs), nested or recording.carried > carried


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
    if type(value) in _TENSORS:  # what most of them are
        return recording.hold(value, mark)
    if type(value) is SavedTensor:
        return recording.hold(value.constant(), mark)
    if isinstance(value, torch.Tensor) and not isinstance(value, AnyRecorded):
        return recording.hold(writable(value), mark)

    def leaf(item: Any) -> Any:
        if isinstance(item, AnyRecorded):
            if item._recording is recording:
                if not item._operand:
                    refuse_structure(item, Location(*mark))
                current = recording.current(item._ref)
                inputs.append(current.index)
                return current
            if recording.parent is not None and _is_around(recording, item):
                captured = recording.current(capture(recording, item, mark))
                inputs.append(captured.index)
                return captured
            if item._recording.open and recording.comes_after(item._recording):
                recording.carried += 1
                return _carried(item, mark)
            return item.result(Location(*mark))
        if type(item) is SavedTensor:
            return recording.hold(item.constant(), mark)
        if type(item) is SavedList:
            # Not by `leaf`, which would then refer to itself: a cycle that only the collector ends.
            return encode(recording, item.value, inputs, mark)
        if isinstance(item, torch.Tensor):
            return recording.hold(writable(item), mark)
        if type(item) in PLAIN or isinstance(item, Function | WeightRef):
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


def add_input(branch: Recording, mark: Mark) -> Ref:
    """Adds an input to the function of a `cond` or `fold`.

    Args:
        branch: what records that function.
        mark: the user's line.
    """
    rows = branch.graph.rows
    rows.append((INPUT, (branch.inputs,), NO_KWARGS, (), False, mark))
    branch.inputs += 1
    return ref(len(rows) - 1)


def capture(branch: Recording, value: AnyRecorded, mark: Mark) -> Ref:
    """Returns the input through which such a function gets a value from around it.

    Args:
        branch: what records that function.
        value: a value of the recording that uses it, of one around that, or of an earlier block.
        mark: the user's line.
    """
    parent = cast(Recording, branch.parent)
    if parent.comes_after(value._recording):
        # A node that gives what it is given: functions take values of their own block alone.
        value = Recorded(parent, add_node(parent, GETITEM, ((value,), 0), NO_KWARGS, mark))
    elif value._recording is not parent:
        value = Recorded(parent, capture(parent, value, mark))
    source = parent.current(value._ref)
    index = source.index
    if index not in branch.inside:
        branch.inside[index] = add_input(branch, mark)
    return branch.inside[index]


def _carried(value: AnyRecorded, mark: Mark) -> Carried:
    """What stands for a value, as it is at this line, in a later block of its session."""
    recording = value._recording
    source, rows = recording.current(value._ref), recording.graph.rows
    cell = Cell()
    recording.saves[len(rows)] = cell
    table_of(recording, "lent")[len(rows)] = cell
    rows.append((SAVE, (source,), NO_KWARGS, source.inputs, False, mark))
    return Carried(cell, lambda: fake_value(recording, source.index))


def _is_around(recording: Recording, value: AnyRecorded) -> bool:
    """Whether a value is of what the function that is recorded here is used in, or before that."""
    other, parent = value._recording, recording.parent
    while parent is not None and parent is not other:
        if other.open and parent.comes_after(other):
            return True
        parent = parent.parent
    return parent is other


def described(item: object) -> str:
    """Returns what to call a thing that is no value of a run."""
    kind = f"{type(item).__module__}.{type(item).__qualname__}".removeprefix("builtins.")
    return f"a value of type {kind}" if not callable(item) else f"a function ({kind})"
