"""How lines of Python become nodes: one recording for each block.

A recording owns the graph that a block writes, the cells that its saved values will be put into,
and what is known of shapes. It is open until the block ends.
What takes the place of a value is recorded by `intervention.py` and `in_place.py`, and gradients
by `differentiation.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from insitu.graph.context import (
    NO_CASTS,
    Casts,
    default_dtype,
    difference,
    enabled_casts,
    is_autocast_enabled,
    is_grad_enabled,
)
from insitu.graph.encoding import KEYS, PLAIN, encode, is_constant
from insitu.graph.errors import OperationError
from insitu.graph.intervention import refuse_unseen
from insitu.graph.location import Location, Mark
from insitu.graph.node import (
    EVERY,
    NO_KWARGS,
    Address,
    Carried,
    Function,
    Graph,
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
    SAVE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.put import WHOLE, is_entry
from insitu.graph.recorded import AnyRecorded, Cell, Holder, Missing, Recorded, refuse_structure

if TYPE_CHECKING:
    from insitu.graph.views import Views

_NAMED = (Function, ModuleRef, Subgraph)
_NOT_COMPUTED = (INPUT, REPLACE, SKIP, WRITE)  # no context makes a difference to these


class _Branches(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recording] = []


_branches = _Branches()


def branches() -> list[Recording]:
    """Returns what this thread is recording for `cond` and `fold`, outermost first."""
    return _branches.stack


class ShapeSource(Protocol):
    """Knows, without running the model, the shapes of what will arrive at its sites."""

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        ...

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""
        ...

    def writer(self) -> int | None:
        """Returns in which invocation the running line stands, None if in none."""
        ...

    def weight_path(self, tensor: torch.Tensor) -> str | None:
        """Returns the path of a weight of the model, None if the tensor is something else."""
        ...

    def weight(self, path: str) -> torch.Tensor:
        """Returns a weight of the model, with data or without."""
        ...


class Lines(Protocol):
    """What was recorded, as far as a run or a scan of it asks: here, or in another process.

    Attributes:
        graph: as of `Recording`, and so are the others.
        saves: likewise.
        shapes: likewise.
        fakes: likewise.
        casts: likewise.
        dtype: likewise.
        as_first_step: likewise.
        counting: what counts the operations of fake values, None if nobody wants to know.
    """

    graph: Graph
    saves: dict[int, Holder]
    shapes: ShapeSource | None
    fakes: dict[int, Any]
    casts: Casts
    dtype: torch.dtype
    as_first_step: bool
    counting: AbstractContextManager[Any] | None


class Recording:
    """What one block records.

    Attributes:
        graph: the nodes so far.
        saves: where the run has to put what is saved, by the index of the node that saves it.
        sites: what lines that come now read at a site: what arrives, or what was last assigned.
        views: what values stand for now, once anything was written in place; None before that.
        direct: whether lines are recorded with values as they are: nothing was written in place,
            and the block is of no session.
        gradients: what lines that come now mean by the gradient of a node's value, of the backward
            pass that they name or of none that they name.
        differentiated: the backward pass of the `with` around the lines that come now.
        shown: what lines that come now read by standard names.
        computed: the nodes that stand for values by name that are no part of the model, with what
            to write instead of writing into them.
        session: what holds it together with other recordings, whose values it may use.
        order: its place among them.
        parent: of the function of a `cond` or `fold`: what it is used in.
        captured: the parent's values that such a function uses.
        open: whether lines still add to it.
        repeating: whether lines are recorded for every step, so that what they save is a list.
        carried: how many values of earlier blocks of the session it has taken.
        lent: where later blocks of the session find values of this one, by the node that saves it.
        names: the names of saved values that were given one, by the node that saves it.
        shapes: gives the shapes at sites; None where no model is behind the recording.
        fakes: fake values of nodes, as far as anybody has asked, by node index.
        grads: whether autograd was on where the block began.
        casts: where autocast was enabled there.
        dtype: the default dtype there.
        counting: None.
        as_first_step: whether sites of later steps count as those of the first, while a question
            is answered to which that makes no difference.
    """

    # What most recordings never use is of the class: nothing is made for it until it is needed.
    gradients: dict[tuple[Ref, Ref | None], Ref] | None = None
    differentiated: Ref | None = None
    shown: dict[Any, Any] | None = None
    computed: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    parent: Recording | None = None
    session: object = None
    order: int = 0
    carried: int = 0
    lent: Mapping[int, Cell] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    names: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    dtype: torch.dtype = torch.float32
    as_first_step: bool = False
    counting: AbstractContextManager[Any] | None = None

    def __init__(self, shapes: ShapeSource | None = None, parent: Recording | None = None) -> None:
        self.graph = Graph([])
        self.saves: dict[int, Holder] = {}
        self.sites: dict[Address, Ref] = {}
        self.shapes = shapes
        self.fakes: dict[int, Any] = {}
        # What nearly every line asks for: Python finds it here in half the time.
        self.open = True
        self.direct = True
        self.repeating = False
        self.grads = True
        self.casts: Casts = NO_CASTS
        self.views: Views | None = None
        if parent is not None:
            self.parent = parent
            self.captured: list[Recorded] = []
            self._inside: dict[int, Ref] = {}
            self._inputs = 0

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
                    from insitu.graph.whole_calls import refuse_inside_forward

                    refuse_inside_forward(self.graph.rows[index][-1])
                self.graph.contexts = {**self.graph.contexts, index: context}

    def forget_contexts(self, start: int) -> None:
        """Lets the nodes from one on run in the context of the block, whatever is around them.

        Args:
            start: the first of them.
        """
        if self.graph.contexts:
            kept = {index: c for index, c in self.graph.contexts.items() if index < start}
            self.graph.contexts = kept

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
                key: arg
                if type(arg) in PLAIN or type(arg) is bool
                else encode(self, arg, inputs, mark)
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

    def fail(self, reason: str) -> None:
        """Says of every saved value why it will have none, and forgets the rest."""
        missing = Missing(reason)
        for cell in self.saves.values():
            cell._put(missing)
        self.forget()

    def forget(self) -> None:
        """Drops what only an open recording needs, so that one kept proxy keeps one value.

        Without the shape source a recording is in no reference cycle, so what nobody keeps is
        gone at once and not at some later garbage collection.
        """
        self.saves = {}
        self.sites = {}
        self.fakes = {}
        self.shapes = self.views = None

    def input(self, mark: Mark) -> Ref:
        """Adds an input, to the function of a `cond` or `fold`."""
        self._inputs += 1
        return self.apply(INPUT, (self._inputs - 1,), NO_KWARGS, mark)

    def capture(self, value: AnyRecorded, mark: Mark) -> Ref:
        """Returns the input through which such a function gets a value from around it.

        Args:
            value: a value of the parent, or of what is around that.
            mark: the user's line.
        """
        parent = cast("Recording", self.parent)
        if value._recording is not parent:
            value = Recorded(parent, parent.capture(value, mark))
        source = parent.current(value)
        index = source.index
        if index not in self._inside:
            self._inside[index] = self.input(mark)
            self.captured.append(Recorded(parent, source))
        return self._inside[index]

    def current(self, value: AnyRecorded) -> Ref:
        """Returns what a value of this recording stands for in a line that comes now."""
        return value._ref if self.views is None else self.views.resolved(value._ref)

    def encode(self, value: Any, mark: Mark) -> Any:
        """Returns a value with references in the place of recorded values."""
        return encode(self, value, [], mark)

    def carry(self, value: AnyRecorded, mark: Mark) -> Carried:
        """Returns what stands for a value of this block in a later one of its session.

        Args:
            value: the value, as it is at this line.
            mark: the user's line.
        """
        source, rows = self.current(value), self.graph.rows
        cell = Cell()
        self.saves[len(rows)] = cell
        self.lent = {**self.lent, len(rows): cell}
        rows.append((SAVE, (source,), NO_KWARGS, source.inputs, False, mark))

        def fake() -> Any:
            from insitu.graph.shapes import fake_value

            return fake_value(self, source.index)

        return Carried(cell, fake)
