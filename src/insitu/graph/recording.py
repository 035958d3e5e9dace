"""How lines of Python become nodes: one recording for each block.

A recording owns the graph that a block writes, the cells that its saved values will be put into,
and what is known of shapes. It is open until the block ends.
What takes the place of a value is recorded by `intervention.py` and `in_place.py`, and gradients
by `differentiation.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from insitu.graph.context import (
    default_dtype,
    difference,
    enabled_casts,
    is_autocast_enabled,
    is_grad_enabled,
    refuse_inside_forward,
)
from insitu.graph.encoding import KEYS, PLAIN, encode, is_constant
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import (
    EVERY,
    NO_KWARGS,
    Address,
    Function,
    ModuleRef,
    Ref,
    Site,
    Subgraph,
    ref,
)
from insitu.graph.operations import (
    GETITEM,
    INPUT,
    READ,
    REPLACE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.put import WHOLE, is_entry
from insitu.graph.recorded import AnyRecorded, AnyRecording, refuse_structure

if TYPE_CHECKING:
    pass

_NAMED = (Function, ModuleRef, Subgraph)
_NOT_COMPUTED = (INPUT, REPLACE, SKIP, WRITE)  # no context makes a difference to these


class _Branches(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recording] = []


_branches = _Branches()


def branches() -> list[Recording]:
    """Returns what this thread is recording for `cond` and `fold`, outermost first."""
    return _branches.stack


class Recording(AnyRecording):
    """What one block records, and how its lines become nodes."""

    def begin(self) -> None:
        """Notes in what context the block begins: that one holds for all of its run."""
        self.dtype = default_dtype()
        if not is_grad_enabled():
            self.grads = False
        if is_autocast_enabled():
            self.casts = enabled_casts()

    def note_context(self, operation: Operation, index: int) -> None:
        """Notes the context of a line, if it is not that of the block."""
        if operation not in _NOT_COMPUTED:
            context = difference(self.grads, self.casts, self.dtype)
            if context is not None:
                if not context.grad:
                    refuse_inside_forward(self.graph.rows[index][-1])
                self.graph.contexts = {**self.graph.contexts, index: context}

    def apply(
        self, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any], mark: Mark
    ) -> Ref:
        """Records an operation on values and constants.

        Args:
            operation: an entry of the registry.
            args: its arguments: recorded values, constants, or containers of both.
            kwargs: its keyword arguments, likewise.
            mark: the user's line.

        Raises:
            OperationError: if an argument is of a kind that cannot be recorded, or asks for a
                write in place.
            NoValueError: if an argument belongs to another block and has no value.
        """
        rows = self.graph.rows
        if len(args) == 2 and not kwargs:  # most are: a value, an operator and a constant
            value, other = args
            kind = type(other)  # pyright: ignore[reportUnknownVariableType]
            if (
                (kind in PLAIN or (kind in KEYS and is_constant(other)))
                and isinstance(value, AnyRecorded)
                and value._recording is self
                and self.views is None
                and (value._operand or operation is GETITEM)
            ):
                source = value._ref
                index = len(rows)
                rows.append((operation, (source, other), kwargs, source.inputs, False, mark))
                if (
                    is_grad_enabled() is not self.grads
                    or default_dtype() is not self.dtype
                    or (operation.casts and (is_autocast_enabled() or self.casts))
                ):
                    self.note_context(operation, index)
                return ref(index)
        inputs: list[int] = []
        encoded: list[Any] = []
        nested = False
        for arg in args:
            kind = type(arg)  # pyright: ignore[reportUnknownVariableType]
            if kind in PLAIN or (kind in KEYS and is_constant(arg)):
                encoded.append(arg)
            elif kind in _NAMED:
                encoded.append(arg)
                nested = True
            elif issubclass(kind, AnyRecorded) and arg._recording is self:
                if not arg._operand and operation is not GETITEM:
                    refuse_structure(arg, Location(*mark))
                source = arg._ref if self.views is None else self.views.resolved(arg._ref)
                inputs.append(source.index)
                encoded.append(source)
            else:
                before, carried = len(inputs), self.carried
                encoded.append(encode(self, arg, inputs, mark))
                nested = nested or (len(inputs) > before and type(encoded[-1]) is not Ref)
                nested = nested or self.carried > carried
        if kwargs:
            if kwargs.get("out") is not None or kwargs.get("inplace"):
                raise OperationError(
                    f"{operation.name} cannot write into one of its arguments here: leave out "
                    "`out=` and `inplace=` and use what it returns.",
                    Location(*mark),
                )
            before, carried = len(inputs), self.carried
            kwargs = {
                key: arg if type(arg) in PLAIN else encode(self, arg, inputs, mark)
                for key, arg in kwargs.items()
            }
            nested = nested or len(inputs) > before or self.carried > carried
        index = len(rows)
        rows.append((operation, tuple(encoded), kwargs, tuple(inputs), nested, mark))
        if (
            is_grad_enabled() is not self.grads
            or default_dtype() is not self.dtype
            or (operation.casts and (is_autocast_enabled() or self.casts))
        ):
            self.note_context(operation, index)
        return ref(index)

    def holds(self, source: Ref, value: Any, key: Any = WHOLE) -> bool:
        """Returns whether a value is what stands there already, so that assigning it is idle.

        Python assigns what it has written in place once more: `x[0] += 1` is a write in place to
        `x[0]`, and then an assignment of `x[0]` to itself.

        Args:
            source: what stands there, or what it is a part of.
            value: what is assigned.
            key: which part.
        """
        if not isinstance(value, AnyRecorded) or value._recording is not self:
            return False
        if self.views is not None:
            return self.views.holds(source, value._ref, key)
        if key is WHOLE:
            return value._ref == source
        operation, args, *_ = self.graph.rows[value._ref.index]
        return operation is GETITEM and args[0] == source and is_entry(args[1], key)

    def read(self, address: Address, mark: Mark) -> Ref:
        """Returns what stands at a site for lines that come now.

        Args:
            address: the site.
            mark: the user's line.
        """
        return self.sites.get(address) or self.first_read(address, mark)

    def first_read(self, address: Address, mark: Mark) -> Ref:
        """Returns what stands at a site for lines that come now, if none has used it so far.

        Args:
            address: the site.
            mark: the user's line.
        """
        rows = self.graph.rows
        if self.graph.writes:
            every = self.sites.get((*address[:4], EVERY))
            original = -1 if every is None else self.graph.original(every.index)
            if original in self.graph.writes:
                self.graph.after = {**self.graph.after, len(rows): original}
            elif address[4] == EVERY:
                refuse_unseen(self, address, mark)
        index = len(rows)
        source = self.sites[address] = ref(index)
        rows.append((READ, address, NO_KWARGS, (), False, mark))
        return source

    def stop(self, output: Ref, mark: Mark) -> None:
        """Records that the run ends where a module has returned.

        Args:
            output: what it returns.
            mark: the user's line.
        """
        self.graph.stops = {**self.graph.stops, self.graph.original(output.index): mark}


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
                f"`{Site(*address)}` cannot be used where `{Site(*other)}` was, and one of them is "
                "written: what holds in every step comes before what holds in one. Put the "
                "`every_step` block first, or write `for step in generator.steps:` for it.",
                Location(*mark),
            )
