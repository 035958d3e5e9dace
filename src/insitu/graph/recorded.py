"""What a block has recorded so far, and the values that stand for what its run will make."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch

from insitu.graph.cells import Cell, Holder, Missing
from insitu.graph.context import NO_CASTS, Casts
from insitu.graph.errors import NoValueError, OperationError
from insitu.graph.expression import expression
from insitu.graph.lines import ShapeSource
from insitu.graph.location import Location, here
from insitu.graph.node import NO_KWARGS, Address, Graph, Ref
from insitu.graph.views import Views


class AnyRecording:
    """What one block records, as far as its values need it.

    Attributes:
        graph: the nodes so far.
        saves: where the run has to put what is saved, by the index of the node that saves it.
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
        captured: the parent's values that such a function uses.
        inside: the inputs through which it gets them, by their nodes in the parent.
        inputs: how many inputs it has.
        open: whether lines still add to it.
        repeating: whether lines are recorded for every step, so that what they save is a list.
        carried: how many values of earlier blocks of the session it has taken.
        lent: where later blocks of the session find values of this one, by the node that saves it.
        kept: none: what later blocks use has a node of its own, in `lent`.
        names: the names of saved values that were given one, by the node that saves it.
        numbers: None: it is no part of a block.
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
    gradients: dict[Ref | None, dict[Ref, Ref]] | None = None
    differentiated: Ref | None = None
    shown: dict[Any, Any] | None = None
    computed: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    parent: AnyRecording | None = None
    session: object = None
    order: int = 0
    carried: int = 0
    lent: Mapping[int, Cell] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    kept: tuple[int, ...] = ()
    numbers: None = None
    names: Mapping[int, str] = NO_KWARGS  # pyright: ignore[reportAssignmentType]
    dtype: torch.dtype = torch.float32
    as_first_step: bool = False
    counting: AbstractContextManager[Any] | None = None

    def __init__(
        self, shapes: ShapeSource | None = None, parent: AnyRecording | None = None
    ) -> None:
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
            self.inside: dict[int, Ref] = {}
            self.inputs = 0

    def current(self, value: AnyRecorded) -> Ref:
        """Returns what a value of this recording stands for in a line that comes now."""
        return value._ref if self.views is None else self.views.resolved(value._ref)

    def forget_contexts(self, start: int) -> None:
        """Lets the nodes from one on run in the context of the block, whatever is around them.

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
        self.shapes = self.views = None


class AnyRecorded:
    """A value that a recording knows: the part of a proxy that recordings need.

    It has no slots, so that a tensor can be one too.

    Attributes:
        _recording: where it was recorded.
        _ref: the node that makes it.
        _cell: where its value was last saved to, if it was saved.
        _operand: whether operations other than indexing make sense on it.
    """

    _operand: ClassVar[bool] = True
    __slots__ = ()
    if TYPE_CHECKING:
        _recording: AnyRecording
        _ref: Ref
        _cell: Holder | None

    def result(self, location: Location | None = None) -> Any:
        """Returns what the run saved for this value.

        Raises:
            NoValueError: before the run, after a failed one, or if the value was not saved.
        """
        cell = self._cell
        content = None if cell is None else cell._content
        if cell is not None and type(content) is not Missing:
            return content
        location = location or here(3)
        what = f"`{self.written()}`"
        if self._recording.open:
            raise NoValueError(
                f"{what} has no value yet: the model runs when the outermost `with` block ends. "
                "Read it after the block, or keep computing with it here.",
                location,
            )
        if cell is None:
            raise NoValueError(
                f"{what} was not saved, so its value is gone: write `.save()` after it inside the "
                f"block, at\n{self._recording.graph[self._ref.index].location}",
                location,
            )
        raise NoValueError(f"{what} has no value: {cast(Missing, content).reason}", location)

    def written(self) -> str:
        """Returns the expression that this value stands for."""
        return expression(self._recording.graph, self._ref.index)


class Recorded(AnyRecorded):
    """A value that a recording knows, and nothing else."""

    __slots__ = ("_cell", "_recording", "_ref")

    def __init__(self, recording: AnyRecording, ref: Ref, cell: Holder | None = None) -> None:
        self._recording = recording
        self._ref = ref
        self._cell = cell


def refuse_structure(recorded: AnyRecorded, location: Location) -> NoReturn:
    """Raises: an operation on tensors was given a tuple."""
    written = recorded.written()
    raise OperationError(
        f"`{written}` is a tuple, not a tensor: write `{written}[0]` for its first element (of a "
        "transformer block, the hidden states).",
        location,
    )


def unassignable(name: str, location: Location) -> OperationError:
    """Returns the error for an attribute of a recorded value that is assigned.

    Args:
        name: the attribute.
        location: the user's line.
    """
    instead = "`value[...] = new` writes into a tensor"
    if not hasattr(torch.Tensor, name):
        instead = f'write `value["{name}"] = new` for a field of a value, such as of an output'
    return OperationError(f"`.{name}` of a recorded value cannot be assigned: {instead}.", location)
