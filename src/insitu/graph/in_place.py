"""Recording writes in place: operations that write into their first argument.

Python assigns what it has written in place once more: `x[0] += 1` is a write in place to `x[0]`,
and then an assignment of `x[0]` to itself. That one is found here too, and not recorded.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from insitu.graph.encoding import described
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Ref
from insitu.graph.operations import GETITEM, Operation
from insitu.graph.recorded import AnyRecorded
from insitu.graph.structure import is_basic

if TYPE_CHECKING:
    from insitu.graph.recording import Recording

_WHOLE = object()
_VIEWS = frozenset(
    (
        *("flatten", "getitem", "permute", "reshape", "select", "squeeze", "transpose"),
        *("unflatten", "view"),
    )
)


def mutate(
    recording: Recording,
    operation: Operation,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    mark: Mark,
) -> Ref:
    """Records an operation that writes into its first argument.

    Args:
        recording: where it is recorded.
        operation: an entry of the registry.
        args: as of `Recording.apply`, and so are its errors.
        kwargs: likewise.
        mark: the user's line.

    Raises:
        OperationError: if what it would write into is no value of the run.
    """
    target = args[0] if args else None
    if not isinstance(target, AnyRecorded) or target._recording is not recording:
        raise OperationError(
            f"`{operation.short}` would write into {described(target)} that is not a value of "
            "this run: use the operation without the underscore, or write into `.clone()` of "
            "a value of the run.",
            Location(*mark),
        )
    if recording.computed:
        _refuse_computed(recording, target, Location(*mark))
    written = recording.apply(operation, args, kwargs, mark)
    recording.graph.mutations = (*recording.graph.mutations, written.index)
    return written


def holds(recording: Recording, source: Ref, value: Any, key: Any = _WHOLE) -> bool:
    """Returns whether a value is what stands there already, written in place.

    `x[0] += 1` is a write in place to `x[0]`, and then an assignment of `x[0]` to itself.

    Args:
        recording: where it is recorded.
        source: what stands there, or what it is a part of.
        value: what is assigned.
        key: which part.
    """
    if not isinstance(value, AnyRecorded) or value._recording is not recording:
        return False
    rows = recording.graph.rows
    index = value._ref.index
    if not rows[index][0].in_place:
        return False
    while rows[index][0].in_place:
        index = rows[index][3][0]
    if key is _WHOLE:
        return index == source.index
    operation, args, _, inputs, _, _ = rows[index]
    same = operation is GETITEM and inputs == source.inputs and args[1] is key
    return same and is_basic(key)


def _refuse_computed(recording: Recording, target: AnyRecorded, location: Location) -> None:
    """Raises if a write in place would be to a part of something that was only computed."""
    index = target._ref.index
    while index not in recording.computed:
        operation, _, _, inputs, _, _ = recording.graph.rows[index]
        if not inputs or operation.short not in _VIEWS:
            return
        index = inputs[0]
    raise OperationError(
        f"`{target.written()}` is computed and no part of the model, which would not see what "
        f"is written into it: {recording.computed[index]}",
        location,
    )
