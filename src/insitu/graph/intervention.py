"""Recording what takes the place of a site's value: writes of all of it or of a part, and skips."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any, cast

import torch

from insitu.graph.encoding import encoded
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import EVERY, NO_KWARGS, Address, Ref, Row, Site, ref, table_of
from insitu.graph.operations import (
    APPLY,
    COND,
    FOLD,
    GETITEM,
    INPUT,
    PUT,
    READ,
    REPLACE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.put import Step
from insitu.graph.recorded import AnyRecorded, Recorded, inside_function
from insitu.graph.recording import Recording, refuse_mixed
from insitu.graph.standing import below, holds, site_of, with_entries
from insitu.graph.structure import map_structure

_STRUCTURES = (APPLY, COND, FOLD, INPUT, READ, REPLACE, SKIP, WRITE)  # give tuples, or may do so


def write(recording: Recording, address: Address, value: Any, block: bool, mark: Mark) -> Ref:
    """Records that a value takes the place of what arrives at a site.

    Args:
        recording: where it is recorded.
        address: the site.
        value: recorded values, constants, or containers of both.
        block: whether it is the output of a transformer block.
        mark: the user's line.

    Raises:
        OperationError: if the first argument of a module is written and all of them are used.
    """
    check_writable(recording, address, mark)
    rows = recording.graph.rows
    standing = recording.sites.get(address)
    if standing is None:
        standing = recording.read(address, mark)
    elif holds(recording, standing, value):
        return standing
    if rows[standing.index][0] is SKIP:
        raise OperationError(
            f"`{Site(*address)}` is what `skip` was given, at\n"
            f"{recording.graph[standing.index].location}\nGive it this value instead.",
            Location(*mark),
        )
    standing = recording.current(standing)
    before = read = standing
    if rows[standing.index][0] in (PUT, WRITE):
        read = ref(recording.graph.original(standing.index))
        if _is_whole(recording, value) or not (block and _may_be_structure(recording, standing)):
            standing = read  # of what was written before, nothing stays
    inputs = None
    if type(value) is torch.Tensor:
        value, inputs = recording.hold(value, mark), standing.inputs
    elif isinstance(value, AnyRecorded) and value._recording is recording:
        value = recording.current(value._ref)  # a whole tuple may be written
        inputs = (standing.index, value.index)
    if inputs is not None:  # nearly always: without a look at each argument
        rows.append((WRITE, (standing, value, block), NO_KWARGS, inputs, False, mark))
        written = ref(len(rows) - 1)
    else:
        written = _of_site(recording, WRITE, standing, (value, block), mark)
    recording.graph.writes[read.index] = written.index
    recording.sites[address] = written
    if recording.views is not None:
        recording.views.assign(before.index, written.index, rows[written.index][1][1])
    return written


def _of_site(
    recording: Recording, operation: Operation, site: Ref, args: tuple[Any, ...], mark: Mark
) -> Ref:
    """Records an operation on the value that stands at a site, with all writes into it."""
    made, _, inputs, nested = encoded(recording, args, NO_KWARGS, mark)
    rows = recording.graph.rows
    sources = (site.index, *inputs)
    rows.append((operation, (site, *made), NO_KWARGS, sources, nested, mark))
    return ref(len(rows) - 1)


def check_writable(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site cannot be written here, or beside what else was done to it.

    Args:
        recording: where it is recorded.
        address: the site.
        mark: the user's line.

    Raises:
        OperationError: if it cannot.
    """
    if not recording.open:
        raise inside_function(Location(*mark))
    if address[2] != "output":
        _refuse_both_inputs(recording, address, mark)
    if address[4] == EVERY:
        refuse_mixed(recording, address, mark)


def write_part(
    recording: Recording, source: Ref, key: Any, value: Any, block: bool, mark: Mark
) -> Ref | None:
    """Records that a value takes the place of an entry of what stands at a site.

    Args:
        recording: where it is recorded.
        source: what stands at the site, or stood there before entries of it were written.
        key: which entry.
        value: as of `write`.
        block: as of `write`.
        mark: the user's line.

    Returns:
        What stands there then; None if the source is no site's value.
    """
    if recording.views is not None:
        recording.views.check_entry(source, key, mark)
        source = recording.views.resolved(source)
    address = site_of(recording, source)
    if address is None:
        return None
    source = _without_part(recording, with_entries(recording, source, address), key)
    part = _of_site(recording, REPLACE, source, (key, value), mark)
    return write(recording, address, Recorded(recording, part), block, mark)


def _is_whole(recording: Recording, value: Any) -> bool:
    """Whether a value has all parts of the one to stand at a site: see `write_part`."""
    if not isinstance(value, AnyRecorded) or value._recording is not recording:
        return False
    return recording.graph.rows[recording.current(value._ref).index][0] is REPLACE


def _may_be_structure(recording: Recording, written: Ref) -> bool:
    """Whether what was written to a site may be more than its first part alone."""
    operation, (_, value, *_), *_ = recording.graph.rows[written.index]
    if operation is PUT:
        return True
    if type(value) is Ref:
        return recording.graph.rows[value.index][0] in _STRUCTURES
    return not isinstance(value, torch.Tensor)


def _without_part(recording: Recording, source: Ref, key: Any) -> Ref:
    """Returns what stands at a site without what was written to one of its parts.

    That part is about to be replaced, so nothing is to wait for what it was.
    """
    rows = recording.graph.rows
    base, changes = source, list[int]()
    while (before := below(rows, base)) is not None:
        operation, args, *_ = rows[base.index]
        if operation is not WRITE:
            changes.append(base.index)
        base = before
        if operation is REPLACE and args[1] == key:
            break  # when that was written, what was below it of this part was left out
    while changes and _changed_part(rows[changes[-1]]) != key:
        base = ref(changes.pop())  # stays as it is, below what is left out
    if not changes:
        return source
    others = [index for index in reversed(changes) if _changed_part(rows[index]) != key]
    for index in others:
        operation, args, kwargs, inputs, nested, mark = rows[index]
        of_base = (base.index, *inputs[1:])
        row = (operation, (base, *args[1:]), kwargs, of_base, nested, mark)
        base = ref(recording.graph.add_like(index, row))
    return base


def _changed_part(row: Row) -> Any:
    """The key of the entry of a structure which a node changes; all else is equal to no key."""
    operation, args, *_ = row
    if operation is REPLACE:
        return args[1]
    first = cast("tuple[Step, ...]", args[1])[:1]
    for name, place, others, _ in first:
        if name == GETITEM.name and place == 0:
            return others[0]
    return row


def skip(recording: Recording, address: Address, value: Any, mark: Mark) -> None:
    """Records that a module does not run, and what stands for its output.

    Args:
        recording: where it is recorded.
        address: its output.
        value: recorded values, constants, or containers of both.
        mark: the user's line.

    Raises:
        OperationError: if its own output was used before.
    """
    if recording.suspended:
        raise inside_function(Location(*mark))
    if address in recording.sites:
        used = recording.graph[recording.sites[address].index].location
        raise OperationError(
            f"`{Site(*address)}` is used before, at\n{used}\nA module that is skipped has no "
            "output of its own: what stands for it can be read after this line.",
            Location(*mark),
        )
    if not any(isinstance(leaf, torch.Tensor | AnyRecorded) for leaf in _leaves(value)):
        raise OperationError(
            f"What stands for `{Site(*address)}` is a tensor or a value of the run, or a tuple of "
            f"them, and not {value!r}: `skip(module.input)` hands on what the module is given.",
            Location(*mark),
        )
    invocation, path, _, call, step = address
    inputs = recording.read((invocation, path, "inputs", call, step), mark)
    if isinstance(value, AnyRecorded) and value._recording is recording:
        value = Recorded(recording, recording.current(value._ref))  # a whole tuple may stand there
    inputs = ref(recording.graph.original(inputs.index))
    skipped = _of_site(recording, SKIP, inputs, (value,), mark)
    table_of(recording.graph, "skips")[inputs.index] = skipped.index
    recording.sites[address] = skipped


def _refuse_both_inputs(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if the first argument of a module is written and all of them are used."""
    invocation, path, kind, call, step = address
    other = {"input": "inputs", "inputs": "input"}.get(kind)
    if other is not None and (invocation, path, other, call, step) in recording.sites:
        raise OperationError(
            f"`{Site(*address)}` cannot be written where `.{other}` of the same module is "
            "used: do both through `.inputs`, which is `(args, kwargs)`.",
            Location(*mark),
        )


def _leaves(value: Any) -> list[Any]:
    """The leaves of a value, however deep."""
    found: list[Any] = []
    map_structure(found.append, value)
    return found
