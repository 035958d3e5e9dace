"""Values that a recording knows: the part of a proxy that recordings need."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import torch

from insitu.graph.cells import Cell as Cell  # scripts of others take it from here
from insitu.graph.cells import Holder, Missing
from insitu.graph.errors import NoValueError, OperationError
from insitu.graph.expression import expression
from insitu.graph.location import Location, here
from insitu.graph.node import Ref
from insitu.graph.recording import Recording
from insitu.habits import OF_VALUES, habit


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
        _recording: Recording
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
        if self._recording.suspended:
            raise inside_function(location)
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

    def __init__(self, recording: Recording, ref: Ref, cell: Holder | None = None) -> None:
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


def inside_function(location: Location) -> OperationError:
    """Returns the error for a change of outer values in a function of `cond` or `fold`.

    Args:
        location: the user's line.
    """
    return OperationError(
        "Functions of `cond` and `fold` compute: nothing is written to the model inside of them, "
        "nor to values around them, and nothing there is saved. Return the new value, and write "
        "it outside: `module.output = cond(pred, then, otherwise, module.output)`. "
        "A `value.clone()` can be changed inside.",
        location,
    )


def unassignable(name: str, location: Location) -> OperationError:
    """Returns the error for an attribute of a recorded value that is assigned.

    Args:
        name: the attribute.
        location: the user's line.
    """
    if name in OF_VALUES:
        message = f"`.{name}` of a recorded value cannot be assigned{habit(name, OF_VALUES)}."
        return OperationError(message, location)
    instead = "`value[...] = new` writes into a tensor"
    if not hasattr(torch.Tensor, name):
        instead = f'write `value["{name}"] = new` for a field of a value, such as of an output'
    return OperationError(f"`.{name}` of a recorded value cannot be assigned: {instead}.", location)
