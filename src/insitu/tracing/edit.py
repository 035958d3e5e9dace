"""Edits: interventions that are recorded once and hold in every later run."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch

from insitu.graph.errors import BlockError, OperationError
from insitu.graph.expression import expression
from insitu.graph.location import here, user_frame
from insitu.graph.node import Graph
from insitu.graph.operations import BACKWARD, GRAD, KEEP, PUT, READ, SAVE
from insitu.graph.ordinary import change_constants, make_constants_ordinary
from insitu.graph.recording import Recording
from insitu.graph.tracebacks import shortened
from insitu.tracing.invocation import Invocation
from insitu.tracing.raw_errors import raise_explained

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject


_OF_ONE_RUN = (SAVE, KEEP, BACKWARD, GRAD)


class Editable(Protocol):
    """A model that can be had with edits."""

    def trace(self) -> Any:
        """Opens a block, whose procedure says how outputs are shown."""
        ...

    def edited(self, graph: Graph) -> Editable:
        """Returns the model with one more edit."""
        ...


Edited = TypeVar("Edited", bound=Editable)


class Edit(Generic[Edited]):
    """What `model.edit()` gives: a context whose lines hold in every run of the edited model.

    Attributes:
        model: the model that the lines are about.
        recording: what they are recorded in.
        procedure: how outputs are shown.
        in_steps: how many contexts are open that say which step lines mean.
    """

    in_steps = 0

    def __init__(self, model: Edited) -> None:
        self.model = model
        self.recording = Recording()
        self.recording.edited = cast("Any", model)
        # Outputs are shown as in a trace: an edit holds in generations too, whose steps are
        # forwards.
        self.procedure = model.trace().block.procedure
        self.is_open = False
        self.promises_output = True
        self._invocations: list[Invocation] = []

    @property
    def graph(self) -> Graph:
        """The recorded graph."""
        return self.recording.graph

    def demand(self, invocation: Invocation, options: Mapping[str, Any]) -> None:
        """Does nothing: the runs that an edit holds in find out what they have to be like."""

    def __enter__(self) -> Edited:
        if self._invocations:
            raise BlockError("This edit was entered before: make a new one.", here())
        self.is_open = True
        self.recording.begin()
        edited = cast("Edited", self.model.edited(self.graph))
        frame = user_frame(2)
        for model in (edited, self.model):  # lines may name either of them
            invocation = Invocation(self, 0, None, model)
            invocation.enter(frame)
            self._invocations.append(invocation)
        return edited

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.is_open = self.recording.open = False
        for invocation in self._invocations:
            invocation.leave()
        graph = self.graph
        if error is not None:
            self.recording.forget()
            graph.rows.clear()
            raise_explained(error)
            shortened(error)
            return
        if torch.is_inference_mode_enabled():  # what is kept is used in blocks of any kind
            make_constants_ordinary(graph)
        try:
            self.recording.check_held()
            # An edit outlives its lines: what they held by reference it has for itself.
            change_constants(graph, self.recording.owned)
            check_edit(graph)
        except OperationError:
            graph.rows.clear()
            raise
        finally:
            self.recording.forget()


def check_edit(graph: Graph) -> None:
    """Raises if lines cannot be an edit, which holds in every run.

    Args:
        graph: the lines.

    Raises:
        OperationError: if it saves, differentiates, or means certain prompts or steps.
    """
    for index, node in enumerate(graph):
        site = node.site
        elsewhere = site is not None and (
            # An edit is replayed for each invocation and step, so it can name none.
            site.invocation or site.step or site.kind in ("tokens", "choice")
        )
        if node.operation in _OF_ONE_RUN or elsewhere:
            raise OperationError(
                f"`{expression(graph, index)}` has no place in an edit, which is in force in every "
                "run: do it in a trace of the edited model.",
                node.location,
            )
    if graph.differentiates or graph.repeats or graph.after or graph.optional:
        raise OperationError(
            "Gradients, steps and saves have no place in an edit, which is in force in every run: "
            "do it in a trace of the edited model.",
            graph[0].location if len(graph) else None,
        )


def _is_of_site(graph: Graph, put: int) -> bool:
    return graph.rows[graph.original(put)][0] is READ


def described(model: Subject) -> list[str]:
    """Returns the edits of a model, a line of Python for each."""
    lines: list[str] = []
    for graph in model.edits:
        handed = {**graph.writes, **graph.skips}
        puts = [at for at, row in enumerate(graph.rows) if row[0] is PUT and _is_of_site(graph, at)]
        for index in sorted({*handed.values(), *puts}):
            node = graph[index]
            if node.operation is PUT:
                lines.append(expression(graph, index))
            elif index in graph.skips.values():
                value = expression(graph, node.inputs[-1])
                lines.append(f"{expression(graph, index).removesuffix('.output')}.skip({value})")
            else:
                value = node.args[1]
                shown = expression(graph, value.index) if hasattr(value, "index") else repr(value)
                lines.append(f"{expression(graph, index)} = {shown}")
        lines.extend(f"{graph[read].site} ends the run" for read in graph.stops)
    return lines
