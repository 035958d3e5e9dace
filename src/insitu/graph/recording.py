"""What a block records, and the facts about it until the block ends.

A recording owns the graph that a block writes, the cells that its saved values will be put into,
and the shapes that are known. How a line becomes a node is in `encoding.py`, what takes the place
of a value in `intervention.py` and `in_place.py`, and gradients in `differentiation.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from insitu.graph.cells import Cell, Holder, Missing
from insitu.graph.context import (
    NO_CASTS,
    Casts,
    default_dtype,
    difference,
    enabled_casts,
    is_autocast_enabled,
    is_grad_enabled,
    refuse_inside_forward,
)
from insitu.graph.errors import OperationError
from insitu.graph.given import each
from insitu.graph.held_tensor import Held
from insitu.graph.lines import Modules, ShapeSource
from insitu.graph.location import Location, Mark
from insitu.graph.node import EVERY, NO_KWARGS, Address, Graph, Ref, Site, ref, table_of
from insitu.graph.operations import INPUT, READ, REPLACE, SKIP, WRITE, Operation
from insitu.graph.read_only import writable
from insitu.graph.structure import independent, is_counted, is_small, sample_of
from insitu.graph.views import Views

_NOT_COMPUTED = (INPUT, REPLACE, SKIP, WRITE)  # no context makes a difference to these


class Together(Protocol):
    """What holds recordings together, such as a session.

    Attributes:
        recording: that of the block that is open now, None between blocks.
    """

    recording: Recording | None


class Recording:
    """What one block records: the graph that it writes, and the facts about it.

    Attributes:
        graph: the nodes so far.
        saves: where the run has to put saved values, by the index of the node that saves each.
        sites: what lines that come now read at a site: what arrives, or what was last assigned.
        views: what values stand for now, once anything was written in place; None before that.
        direct: whether lines are recorded with values as they are: nothing was written in place,
            and the block is of no session.
        gradients: what lines that come now mean by the gradient of a node's value, by the backward
            pass that they name, None if they name none.
        differentiated: the backward pass of the `with` around the lines that come now.
        shown: what lines that come now read by standard names.
        computed: the nodes that stand for values by name that are no part of the model, with what
            to write instead of writing into them.
        session: what holds it together with other recordings, whose values it may use.
        order: its place among them.
        parent: of the function of a `cond` or `fold`: what it is used in.
        inside: the inputs through which such a function gets values of the parent, by their nodes
            there.
        inputs: how many inputs the function has.
        held: the user's own tensors in it, by identity, as they are at their lines.
        open: whether lines still add to it.
        suspended: whether a function of `cond` or `fold` is being recorded, which is used in it.
        repeating: whether lines are recorded for every step, so that what they save is a list.
        carried: how many values of earlier blocks of the session it has taken.
        lent: where later blocks of the session find values of this one, by the node that saves it.
        kept: none: what later blocks use has a node of its own, in `lent`.
        names: the names of saved values that were given one, by the node that saves it.
        taken: the nodes that save values by these names.
        numbers: None: it is no part of a block.
        shapes: gives the shapes at sites; None where no model is behind the recording.
        edited: the model that an edit is of, which has no shapes.
        fakes: fake values of nodes, as far as anybody has asked, by node index.
        grads: whether autograd was on where the block began.
        casts: where autocast was enabled there.
        dtype: the default dtype there.
        counting: None.
        as_first_step: whether sites of later steps count as those of the first, while a question
            is answered to which that makes no difference.
    """

    # What most recordings never use is of the class: nothing is made for it until it is needed.
    gradients: dict[Ref | None, dict[Ref, Ref]] | None = None
    differentiated: Ref | None = None
    shown: dict[Any, Any] | None = None
    computed: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    parent: Recording | None = None
    suspended: bool = False
    session: Together | None = None
    order: int = 0
    carried: int = 0
    lent: Mapping[int, Cell] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    kept: tuple[int, ...] = ()
    numbers: None = None
    names: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    taken: Mapping[str, int] = NO_KWARGS
    dtype: torch.dtype = torch.float32
    as_first_step: bool = False
    counting: AbstractContextManager[Any] | None = None
    edited: Modules | None = None
    held: Mapping[int, Held] = NO_KWARGS  # pyright: ignore[reportAssignmentType]

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
            self.inside: dict[int, Ref] = {}
            self.inputs = 0

    def begin(self) -> None:
        """Notes in what context the block begins: that one holds for all of its run."""
        self.dtype = default_dtype()
        if not is_grad_enabled():
            self.grads = False
        if is_autocast_enabled():
            self.casts = enabled_casts()

    @property
    def model(self) -> Modules | None:
        """The model whose modules its lines can call; None where no model is behind it."""
        owner = self
        while owner.parent is not None:
            owner = owner.parent
        return owner.edited if owner.shapes is None else owner.shapes.model

    def note_context(self, operation: Operation, index: int) -> None:
        """Notes the context of a line, if it is not that of the block."""
        if operation not in _NOT_COMPUTED:
            context = difference(self.grads, self.casts, self.dtype)
            if context is not None:
                if not context.grad:
                    refuse_inside_forward(self.graph.rows[index][-1])
                table_of(self.graph, "contexts")[index] = context

    def take_back(self, index: int) -> None:
        """Takes back the last node, which no other uses.

        Args:
            index: the node.
        """
        self.graph.rows.pop()
        self.fakes.pop(index, None)
        if index in self.graph.contexts:
            del table_of(self.graph, "contexts")[index]

    def read(self, address: Address, mark: Mark) -> Ref:
        """Returns what stands at a site for lines that come now.

        Args:
            address: the site.
            mark: the user's line.
        """
        found = self.sites.get(address)
        if found is None:
            return self.first_read(address, mark)
        if address[4] == EVERY and self.graph.writes:
            refuse_overtaken(self, address, mark)
        return found

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
                table_of(self.graph, "after")[len(rows)] = original
            elif address[4] == EVERY:
                refuse_unseen(self, address, mark)
        index = len(rows)
        source = self.sites[address] = ref(index)
        rows.append((READ, address, NO_KWARGS, (), False, mark))
        return source

    def hold(self, tensor: torch.Tensor, mark: Mark, written: bool = False) -> torch.Tensor:
        """Returns what the graph holds for a tensor of the user's: its value at this line.

        A block runs after its last line, and a loop may have written into the tensor by then:
        `v += 1` for the next invocation. So small ones are copied. Large ones, those that want
        gradients, and those that the run writes into are held by reference. PyTorch's version
        counter tells whether they change. Where nothing is counted, as of NumPy's memory and of
        tensors of inference mode, some of their numbers do, and what has none to look at is copied.
        `tensor.data` is not counted either.

        Args:
            tensor: the tensor.
            mark: the user's line.
            written: whether the run is to write into it.

        Raises:
            OperationError: if it is held by reference, and has changed since another line used it.
        """
        owner = self
        while owner.parent is not None:
            owner = owner.parent
        known: Held | None = owner.held.get(id(tensor))
        version = None if tensor.is_inference() else tensor._version
        if known is not None:
            # Earlier lines may have a copy, and the run is to write into the tensor itself.
            fits = known.written or not written
            if fits and version is not None and known.version == version:
                return known.kept
            if known.kept is tensor:
                known.check()
                if fits and isinstance(known.version, bytes):
                    return tensor
            written = written or known.written
        kept = tensor
        ordinary = type(tensor) is torch.Tensor and not tensor.requires_grad
        if ordinary and not written:
            small, counted = is_small(tensor), version is not None and is_counted(tensor)
            if not counted:  # as far as torch can tell: of a sparse one it counts, and does not say
                version = None if small else sample_of(tensor) or version
            if small or version is None:  # None of a large one: nothing would tell of a write
                kept = independent(tensor)
        table_of(owner, "held")[id(tensor)] = Held(tensor, version, kept, mark, written)
        return kept

    def given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what an invocation is given, with its tensors as they are at this line.

        Args:
            args: its arguments by place.
            kwargs: its arguments by keyword.
            mark: the user's line.

        Raises:
            OperationError: as of `hold`.
        """
        if not kwargs and len(args) == 1:  # as nearly always
            one = args[0]
            if type(one) is torch.Tensor and not one.requires_grad and is_small(one):
                return (one.clone(),), kwargs  # a copy that no line need know of
            if type(one) is str:
                return args, kwargs

        def leaf(item: Any) -> Any:
            return self.hold(writable(item), mark) if isinstance(item, torch.Tensor) else item

        return each(leaf, (args, kwargs))

    def check_held(self) -> None:
        """Raises if a tensor that is held by reference is not what it was at its line.

        Raises:
            OperationError: naming that line.
        """
        for one in self.held.values():
            one.check()

    def owned(self, item: Any) -> Any:
        """Returns a copy of a tensor that is held by reference, and anything else as it is.

        Those that want gradients stay, and so do those that runs write into, such as running
        statistics: their changes are meant.

        Args:
            item: a constant of the graph.
        """
        held: Held | None = self.held.get(id(item)) if isinstance(item, torch.Tensor) else None
        if held is None or held.written or item.requires_grad:
            return item
        return item.detach().clone()

    def stop(self, output: Ref, mark: Mark) -> None:
        """Records that the run ends where a module has returned.

        Args:
            output: what it returns.
            mark: the user's line.
        """
        table_of(self.graph, "stops")[self.graph.original(output.index)] = mark

    @property
    def where_lines_stand(self) -> Recording:
        """What lines that use values of this recording add to: in a session the block around them.

        There autograd runs if that block has gradients, and random numbers are drawn in its turn.
        """
        now = None if self.session is None else self.session.recording
        return now if now is not None and now.comes_after(self) else self

    def comes_after(self, other: Recording) -> bool:
        """Whether this is of a later block of the same session than another."""
        return (
            self.session is not None and self.session is other.session and self.order > other.order
        )

    def current(self, source: Ref) -> Ref:
        """Returns what a value of this recording stands for in a line that comes now."""
        return source if self.views is None else self.views.resolved(source)

    def forget_contexts(self, start: int) -> None:
        """Lets the nodes from one on run in the block's context, and not in that of their lines.

        Args:
            start: the first of them.
        """
        if self.graph.contexts:
            kept = {index: c for index, c in self.graph.contexts.items() if index < start}
            self.graph.contexts = kept

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
        if self.held:
            self.held = {}
        self.shapes = self.views = None


class _Branches(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recording] = []


_branches = _Branches()


def branches() -> list[Recording]:
    """Returns what this thread is recording for `cond` and `fold`, outermost first."""
    return _branches.stack


def refuse_unseen(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site that is read in every step was written in a single one."""
    written = {recording.graph[read].args for read in recording.graph.writes}
    if any(other[:4] == address[:4] for other in written):
        refuse_mixed(recording, address, mark)


def refuse_overtaken(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site of every step has since been written in a single one."""
    written = (recording.graph[read].args for read in recording.graph.writes)
    if any(other[:4] == address[:4] and other[4] != EVERY for other in written):
        refuse_mixed(recording, address, mark)


def refuse_mixed(recording: Recording, address: Address, mark: Mark) -> None:
    """Raises if a site is used in a single step and then in every one, and one use is a write."""
    for other in recording.sites:
        if other[:4] == address[:4] and other[4] != EVERY:
            raise OperationError(
                f"`{Site(*address)}` cannot be used where `{Site(*other)}` was, and one of them is "
                "written: what holds in every step comes before what holds in one. Put the "
                "`every_step` block first, or write `for step in generator.steps:` for it.",
                Location(*mark),
            )
