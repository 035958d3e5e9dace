"""Recording writes in place: operations that write into their first argument.

What they become is in `views.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from insitu.graph.context import default_dtype, is_autocast_enabled, is_grad_enabled
from insitu.graph.encoding import described, encoded
from insitu.graph.errors import OperationError
from insitu.graph.intervention import check_writable
from insitu.graph.location import Location, Mark
from insitu.graph.node import EVERY, Address, Ref, Site, ref
from insitu.graph.operations import PUT, READ, SKIP, Operation
from insitu.graph.recorded import AnyRecorded, inside_function, refuse_structure
from insitu.graph.recording import Recording
from insitu.graph.standing import followed
from insitu.graph.structure import tensors_of
from insitu.graph.views import Views


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
        args: as of `add_node`, and so are its errors.
        kwargs: as of `add_node`.
        mark: the user's line.

    Returns:
        What it has written into.

    Raises:
        OperationError: if that is no value of the run, or the write would be lost.
    """
    target = args[0] if args else None
    if isinstance(target, AnyRecorded) and target._recording.suspended:
        raise inside_function(Location(*mark))
    if not isinstance(target, AnyRecorded) or target._recording is not recording:
        raise OperationError(
            f"`{operation.short}` would write into {described(target)} that is not a value of "
            "this run: use the operation without the underscore, or write into `.clone()` of "
            "a value of the run. To keep a value, write `values.append(x.save())` into a list.",
            Location(*mark),
        )
    if not target._operand:
        refuse_structure(target, Location(*mark))
    others, kwargs, inputs, nested = encoded(recording, args[1:], kwargs, mark)
    if recording.where_lines_stand is not recording:
        _refuse_gradients((others, kwargs), Location(*mark))
    views = followed(recording)
    recording.direct = False
    if recording.computed:
        _refuse_computed(recording, views, target, Location(*mark))
    place = views.located(target._ref, mark)
    if recording.parent is not None and ref(place.base) in recording.inside.values():
        raise inside_function(Location(*mark))  # it would change there, and not around
    _check(recording, views, place.base, mark)
    writer = None if recording.shapes is None else recording.shapes.writer()
    nested = nested or place.nested
    written = views.put(place, operation, others, kwargs, inputs, nested, mark, writer)
    if (
        is_grad_enabled() is not recording.grads
        or default_dtype() is not recording.dtype
        or is_autocast_enabled()
        or recording.casts
    ):
        recording.note_context(PUT, len(recording.graph) - 1)
    return written


def _refuse_gradients(given: Any, location: Location) -> None:
    """Raises if a write into a value of an earlier block is of a tensor that wants gradients."""
    if any(tensor.requires_grad for tensor in tensors_of(given)):
        raise OperationError(
            "This writes a tensor that wants gradients into a value of an earlier block of the "
            "session, and that block runs without them: make a new value of both, such as "
            "`value = value + tensor`.",
            location,
        )


def _check(recording: Recording, views: Views, base: int, mark: Mark) -> None:
    """Raises if a site is not written beside what else was done to it.

    Args:
        recording: where it is recorded.
        views: what knows of its views.
        base: what stands there.
        mark: the user's line.
    """
    if recording.graph.rows[base][0] is SKIP:
        return
    operation, args, *_ = recording.graph.rows[recording.graph.original(base)]
    if operation is READ:
        address = cast("Address", args)
        check_writable(recording, address, mark)
        if address[4] != EVERY:
            _overtake(recording, views, address)


def _overtake(recording: Recording, views: Views, address: Address) -> None:
    """Lets no later line use what a site is in every step: in this one it is written.

    Args:
        recording: where it is recorded.
        views: what knows of its views.
        address: the site, in one step.
    """
    every = recording.sites.get((*address[:4], EVERY))
    if every is not None:
        views.overtake(
            views.base(every),
            f"`{Site(*address)}` was written in place after this value was taken in every step, "
            "and the value would be another in that step: use it before, or write `for step in "
            "generator.steps:` for all of it.",
        )


def _refuse_computed(
    recording: Recording, views: Views, target: AnyRecorded, location: Location
) -> None:
    """Raises if a write in place would be to a part of something that was only computed."""
    found = next((at for at in views.chain(target._ref) if at in recording.computed), None)
    if found is not None:
        raise OperationError(
            f"`{target.written()}` is computed and no part of the model, which would not see a "
            f"write into it: {recording.computed[found]}",
            location,
        )
