"""What stands at a site now, through whichever name of it a line asks, and which writes are idle.

How something is put there is in `intervention.py` and `in_place.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from insitu.graph.node import Address, Ref, Row
from insitu.graph.operations import ATTRIBUTE, GETITEM, PUT, READ, REPLACE, WRITE
from insitu.graph.put import WHOLE, is_entry
from insitu.graph.recorded import AnyRecorded
from insitu.graph.recording import Recording
from insitu.graph.shapes import shares_memory
from insitu.graph.views import Views

_HANDED_ON = (ATTRIBUTE, GETITEM, PUT, REPLACE, WRITE)  # the first input, or a part of it


def holds(recording: Recording, source: Ref, value: Any, key: Any = WHOLE) -> bool:
    """Returns whether a value is what stands there already, so that assigning it is idle.

    Python assigns what it has written in place once more: `x[0] += 1` is a write in place to
    `x[0]`, and then an assignment of `x[0]` to itself.

    Args:
        recording: where it is recorded.
        source: what stands there, or what it is a part of.
        value: the value that is assigned.
        key: which part.
    """
    if not isinstance(value, AnyRecorded) or value._recording is not recording:
        return False
    views = recording.views
    if key is WHOLE:
        return value._ref == source if views is None else views.holds(source, value._ref, key)
    operation, args, *_ = recording.graph.rows[value._ref.index]
    if operation not in (ATTRIBUTE, GETITEM) or not is_entry(args[1], key):
        return False
    if views is not None and args[0] == source and not isinstance(key, int | str):
        return not views.borrows(source)  # a view of that tensor: nothing has to be recorded again
    source = recording.current(source)
    address = site_of(recording, source)
    if address is not None:  # it may have been read before something else was written there
        source = with_entries(recording, source, address)
        if source != recording.current(recording.sites[address]):
            return False
    if views is None:
        if args[0] == source:
            return True
        if _root(recording, args[0]) != _root(recording, source):
            return False
        views = followed(recording)  # other entries were assigned since the value was taken out
    return views.holds(source, value._ref, key)


def followed(recording: Recording) -> Views:
    """Returns what knows of the views of a recording, from now on if there is none so far."""
    if recording.views is None:
        recording.views = Views(recording.graph, partial(shares_memory, recording))
    return recording.views


def site_of(recording: Recording, source: Ref) -> Address | None:
    """Returns the site at which a value stands or has stood; None if it is no site's value.

    What stands for the output of a module that does not run is none.
    """
    rows, index = recording.graph.rows, source.index
    if recording.views is not None:
        index = recording.views.first(index)  # below all writes in place, however many
    while rows[index][0] in (PUT, WRITE):
        index = rows[index][3][0]
    operation, address, *_ = rows[index]
    return cast("Address", address) if operation is READ else None


def with_entries(recording: Recording, source: Ref, address: Address) -> Ref:
    """Returns a site's value with the entries of it that were written since it was read.

    It is not what stands there now if all of it was assigned since.

    Args:
        recording: where it is recorded.
        source: the value.
        address: the site.
    """
    standing = recording.current(recording.sites.get(address, source))
    if standing == source:  # nearly always: without a walk through all writes
        return standing
    rows = recording.graph.rows
    same = _without_entries(rows, standing) == _without_entries(rows, source)
    return standing if same else source


def below(rows: Sequence[Row], value: Ref) -> Ref | None:
    """Returns what a value was before an entry of it was written last, None if none was.

    Args:
        rows: the nodes.
        value: the value.
    """
    operation, args, *_ = rows[value.index]
    if operation in (REPLACE, PUT):
        return cast("Ref", args[0])
    entry = operation is WRITE and type(args[1]) is Ref and rows[args[1].index][0] is REPLACE
    return cast("Ref", args[1]) if entry else None


def _without_entries(rows: Sequence[Row], value: Ref) -> int:
    """The node that gives a site's value before any entry of it was written."""
    while (before := below(rows, value)) is not None:
        value = before
    return value.index


def _root(recording: Recording, value: Any) -> int | None:
    """The node that a value is a part of, through all that was written there."""
    if type(value) is not Ref:
        return None
    rows, index = recording.graph.rows, value.index
    while rows[index][0] in _HANDED_ON and rows[index][3]:
        index = rows[index][3][0]
    return index
