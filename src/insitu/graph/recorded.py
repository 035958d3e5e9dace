"""A value that a recording knows, and the cell that the run puts it into if it is saved."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from insitu.graph.errors import NoValueError, OperationError
from insitu.graph.location import Location, here
from insitu.graph.node import Ref

if TYPE_CHECKING:
    from insitu.graph.recording import Recording


class Missing:
    """Stands in a cell that has no value, and says why."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


_WAITING = Missing("its run failed.")


class Cell:
    """Where a saved value is put.

    Attributes:
        content: the value once the run has put it here; until then, and after a failure,
            a `Missing`.
    """

    content: Any = _WAITING  # of the class: a cell without an `__init__` is made much faster

    @property
    def filled(self) -> bool:
        """Whether there is a value."""
        return type(self.content) is not Missing


class Recorded:
    """A value that a recording knows: the part of a proxy that recordings need.

    Attributes:
        _recording: where it was recorded.
        _ref: the node that makes it.
        _cell: the cell that it was last saved to, if it was saved.
        _operand: whether operations other than indexing make sense on it.
    """

    _operand: ClassVar[bool] = True
    __slots__ = ("_cell", "_recording", "_ref")

    def __init__(self, recording: Recording, ref: Ref, cell: Cell | None = None) -> None:
        self._recording = recording
        self._ref = ref
        self._cell = cell

    def result(self, location: Location | None = None) -> Any:
        """Returns what the run saved for this value.

        Raises:
            NoValueError: before the run, after a failed one, or if the value was not saved.
        """
        cell = self._cell
        if cell is not None and cell.filled:
            return cell.content
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
        raise NoValueError(f"{what} has no value: {cell.content.reason}", location)

    def written(self) -> str:
        """Returns the expression that this value stands for."""
        from insitu.graph.expression import expression

        return expression(self._recording.graph, self._ref.index)


def refuse_structure(recorded: Recorded, location: Location) -> NoReturn:
    """Raises: an operation on tensors was given a tuple."""
    written = recorded.written()
    raise OperationError(
        f"`{written}` is a tuple, not a tensor: write `{written}[0]` for its first element (of a "
        "transformer block, the hidden states).",
        location,
    )
