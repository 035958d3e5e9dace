"""Recording what takes the place of a site's value: writes of all of it or of a part, and skips."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from insitu.graph.errors import OperationError
from insitu.graph.in_place import holds
from insitu.graph.location import Location, Mark
from insitu.graph.node import EVERY, NO_KWARGS, Address, Ref, Site, ref
from insitu.graph.operations import (
    APPLY,
    COND,
    FOLD,
    INPUT,
    READ,
    REPLACE,
    SKIP,
    WRITE,
)
from insitu.graph.recorded import AnyRecorded, Recorded
from insitu.graph.structure import map_structure

if TYPE_CHECKING:
    from insitu.graph.recording import Recording

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
    if not recording.open:
        raise OperationError(
            "Inside `cond` and `fold` nothing is written to the model: return the value, and "
            "write it outside.",
            Location(*mark),
        )
    if address[2] != "output":
        _refuse_both_inputs(recording, address, mark)
    if address[4] == EVERY:
        refuse_mixed(recording, address, mark)
    rows = recording.graph.rows
    standing = recording.sites.get(address)
    if standing is None:
        standing = recording.read(address, mark)
    elif recording.graph.mutations and holds(recording, standing, value):
        return standing
    operation = rows[standing.index][0]
    if operation is SKIP:
        raise OperationError(
            f"`{Site(*address)}` is what `skip` was given, at\n"
            f"{recording.graph[standing.index].location}\nGive it this value instead.",
            Location(*mark),
        )
    read = standing
    if operation is WRITE:
        read = ref(recording.original(standing.index))
        if _is_whole(recording, value) or not (block and _may_be_structure(recording, standing)):
            standing = read  # of what was written before, nothing stays
    inputs = standing.inputs if type(value) is torch.Tensor else None
    if isinstance(value, AnyRecorded) and value._recording is recording:
        value = value._ref  # a whole tuple may be written
        inputs = (standing.index, value.index)
    if inputs is not None:  # nearly always: without a look at each argument
        rows.append((WRITE, (standing, value, block), NO_KWARGS, inputs, False, mark))
        written = ref(len(rows) - 1)
    else:
        args = (Recorded(recording, standing), value, block)
        written = recording.apply(WRITE, args, NO_KWARGS, mark)
    recording.graph.writes[read.index] = written.index
    recording.sites[address] = written
    return written


def write_part(
    recording: Recording, source: Ref, key: Any, value: Any, block: bool, mark: Mark
) -> Ref | None:
    """Records that a value takes the place of an entry of what stands at a site.

    Args:
        recording: where it is recorded.
        source: what stands at the site.
        key: which entry.
        value: as of `write`.
        block: as of `write`.
        mark: the user's line.

    Returns:
        What stands there then; None if the source is no site's value.
    """
    node = recording.graph[recording.original(source.index)]
    if node.operation is not READ or recording.graph.rows[source.index][0] is SKIP:
        return None
    source = _without_part(recording, source, key)
    part = recording.apply(REPLACE, (Recorded(recording, source), key, value), NO_KWARGS, mark)
    return write(recording, cast("Address", node.args), Recorded(recording, part), block, mark)


def _is_whole(recording: Recording, value: Any) -> bool:
    """Whether a value has all parts of what is to stand at a site: see `write_part`."""
    return isinstance(value, AnyRecorded) and recording.graph.rows[value._ref.index][0] is REPLACE


def _may_be_structure(recording: Recording, written: Ref) -> bool:
    """Whether what was written to a site may be more than its first part alone."""
    value = recording.graph.rows[written.index][1][1]
    if type(value) is Ref:
        return recording.graph.rows[value.index][0] in _STRUCTURES
    return not isinstance(value, torch.Tensor)


def _without_part(recording: Recording, source: Ref, key: Any) -> Ref:
    """Returns what stands at a site without what was written to one of its parts.

    That part is about to be replaced, so nothing is to wait for what it was.
    """
    rows = recording.graph.rows
    base, replacements = source, list[int]()
    while True:
        operation, args, *_ = rows[base.index]
        if operation is REPLACE:
            replacements.append(base.index)
            base = cast("Ref", args[0])
        elif operation is WRITE and type(args[1]) is Ref and rows[args[1].index][0] is REPLACE:
            base = args[1]
        else:
            break
    others = [index for index in reversed(replacements) if rows[index][1][1] != key]
    if len(others) == len(replacements):
        return source
    for index in others:
        operation, args, kwargs, inputs, nested, mark = rows[index]
        of_base = (base.index, *inputs[1:])
        rows.append((operation, (base, *args[1:]), kwargs, of_base, nested, mark))
        base = ref(len(rows) - 1)
    return base


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
        value = Recorded(recording, value._ref)  # a whole tuple may stand there
    inputs = ref(recording.original(inputs.index))
    skipped = recording.apply(SKIP, (Recorded(recording, inputs), value), NO_KWARGS, mark)
    recording.graph.skips = {**recording.graph.skips, inputs.index: skipped.index}
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


def refuse_unseen(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site that is read in every step was written in a single one."""
    written = {recording.graph[read].args for read in recording.graph.writes}
    if any(other[:4] == address[:4] for other in written):
        refuse_mixed(recording, address, mark)


def refuse_mixed(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site is used in every step after a single one, of which one is a write."""
    for other in recording.sites:
        if other[:4] == address[:4] and other[4] != EVERY:
            raise OperationError(
                f"`{Site(*address)}` cannot be used where `{Site(*other)}` was, and one of "
                "them is written: what holds in every step comes before what holds in one.",
                Location(*mark),
            )


def _leaves(value: Any) -> list[Any]:
    """What is in a value, however deep."""
    found: list[Any] = []
    map_structure(found.append, value)
    return found
