"""What fails while a block of several invocations runs, and what the rest may go on with.

A pass of one invocation that fails leaves the others alone, so the run goes on. Of a pass of
several the others have no values, so they have to be run again without what failed.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from insitu.engine.dependence import Dependence, Lost
from insitu.engine.job_outcome import Failure
from insitu.graph.errors import ExecutionError, InsituError, LimitError, NoValueError
from insitu.graph.expression import expression, located
from insitu.graph.node import Graph
from insitu.graph.operations import BACKWARD
from insitu.graph.shapes import misfit
from insitu.graph.structure_hints import hint

Raised = TypeVar("Raised", bound=Exception)


@dataclass(slots=True, eq=False)
class Failed:
    """What failed in a run.

    Attributes:
        error: what was raised; None where nothing arrived at a site at which it had to.
        nodes: the nodes that may have failed, one of them; none where the model did.
        invocations: those of the pass.
        is_backward: whether it was a backward pass.
        went: how the pass went in which nothing arrived.
    """

    error: Exception | None
    nodes: Sequence[int]
    invocations: Collection[int]
    is_backward: bool = False
    went: Any = None

    @property
    def is_known(self) -> bool:
        """Whether it is known which node or invocation failed."""
        # Alone in its pass it is the one.
        if len(self.invocations) == 1:
            return True
        return len(self.nodes) == 1 and not is_out_of_memory(self.error)


@dataclass(frozen=True, slots=True, eq=False)
class FailedInvocations:
    """One failure in the run of a block, and what has no value because of it.

    Attributes:
        error: what was raised.
        blamed: the invocations that it is of; none for a line outside of them.
        invocations: all invocations that have no values: these, and those that use something of
            them.
        nodes: the nodes without a value.
    """

    error: Exception
    blamed: Sequence[int]
    invocations: Sequence[int]
    nodes: frozenset[int]


def first_error(errors: Sequence[Raised]) -> Raised:
    """Returns the first of some errors, with the others as notes.

    Args:
        errors: the errors, in the order in which they are to be told.
    """
    first, *others = errors
    told = {str(first), *getattr(first, "__notes__", ())}
    for one in others[:_MOST_NOTES]:
        note = f"Another invocation raised {type(one).__name__}: {one}"
        if not told & {str(one), note}:
            told |= {str(one), note}
            first.add_note(note)
    if len(others) > _MOST_NOTES:
        first.add_note(f"And {len(others) - _MOST_NOTES} more failed.")
    return first


def error_of(failures: Sequence[Failure]) -> InsituError:
    """Returns the error that the run of a job raises for what has failed in it.

    Args:
        failures: what has failed. What only lacks the value of another comes last.
    """
    errors = [one.error for one in failures]
    return first_error([one for one in errors if not isinstance(one, NoValueError)] or errors)


_MOST_NOTES = 10


def ends_all(error: Exception) -> bool:
    """Returns whether an error ends the whole run: a limit that holds for all of it.

    Args:
        error: the error.
    """
    return isinstance(error, LimitError) and error.limit != "values"


class Failures:
    """Collects what fails in a run.

    Args:
        graph: the recorded experiment.
        goes_on: whether the run is to go on after a pass of several invocations has failed, to
            find what else does. Its values are not used then.

    Attributes:
        found: what failed.
        lost: what has no value in this run.
        is_spoiled: whether some of that would have one without what failed.
    """

    def __init__(self, graph: Graph, goes_on: bool = False) -> None:
        self._graph = graph
        self._goes_on = goes_on
        self._dependence: Dependence | None = None
        self.found: list[Failed] = []
        self.lost = Lost()
        self.is_spoiled = False

    @property
    def dependence(self) -> Dependence:
        """Which nodes and invocations use which."""
        if self._dependence is None:
            self._dependence = Dependence(self._graph)
        return self._dependence

    @property
    def ends_run(self) -> bool:
        """Whether nothing more of the run is of use."""
        return self.is_spoiled and not self._goes_on

    def are_of(self, kind: type[Exception]) -> bool:
        """Returns whether an error of some class is among them.

        Args:
            kind: the class.
        """
        return any(isinstance(failed.error, kind) for failed in self.found)

    def forget(self) -> None:
        """Forgets them: all is run again."""
        self.found.clear()
        self.lost, self.is_spoiled = Lost(), False

    def add(self, failed: Failed, goes_into_others: bool = False) -> None:
        """Notes what failed.

        Args:
            failed: what failed.
            goes_into_others: whether other passes go on with what its pass has left.
        """
        if failed.error is not None:
            # What the frames of the run hold would be in memory as long as the others run.
            traceback.clear_frames(failed.error.__traceback__)
        self.found.append(failed)
        before, own = self.lost, self.dependence.lost_by(failed.nodes, failed.invocations)
        # In a backward pass gradients of others may be missing, and rows that begin where this pass
        # ended have begun with what it left.
        harmless = failed.is_known and not (failed.is_backward or goes_into_others)
        if not (harmless and own.invocations.issuperset(failed.invocations)):
            self.is_spoiled = True
            own = self.dependence.lost(failed.nodes, failed.invocations)
        self.lost = before | own

    def hold_up(self, invocations: Collection[int]) -> bool:
        """Returns whether a pass cannot run, because it uses what has no value.

        Args:
            invocations: those of the pass.
        """
        if self.lost.invocations.isdisjoint(invocations):
            return False
        if not self.lost.invocations.issuperset(invocations):
            self.is_spoiled = True
        return True


def is_out_of_memory(error: BaseException | None) -> bool:
    """Returns whether an error, or what it was raised from, is that memory ran out.

    Args:
        error: the error.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        # The allocator of the CPU has no error of its own.
        if isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID):
            return True
        error = error.__cause__
    return False


_SAID = ("DefaultCPUAllocator", "out of memory", "not enough memory")


def operation_error(
    graph: Graph, values: Sequence[Any], index: int, error: Exception
) -> InsituError:
    """Returns the error to raise for a node.

    Args:
        graph: what was being done.
        values: the values of the run so far, by node.
        index: the node that failed.
        error: what it raised.
    """
    node = graph[index]
    if isinstance(error, InsituError):  # of an operation of ours, which knows no line
        return located(graph, index, error)
    written = expression(graph, index)
    found = [values[source] for source in node.inputs]
    other = isinstance(error, torch.OutOfMemoryError) or node.operation is BACKWARD
    if isinstance(error, RuntimeError | IndexError | ValueError) and found and not other:
        return misfit(graph, index, found, error)
    kinds = ", ".join(type(value).__name__ for value in found[:20])
    on = f" on values of type {kinds}" if kinds else ""
    said = f"{type(error).__name__}: {error!s:.2000}"
    said += hint(graph, index, found, error)
    message = f"`{written}` failed{on}: {said}"
    return ExecutionError(message, node.location)
