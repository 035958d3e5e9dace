"""A block that is ready to run: all that its run needs, whoever recorded its lines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from insitu.batching.pass_plan import PassPlan
from insitu.batching.procedure import Procedure, Subject
from insitu.engine.failures import FailedInvocations
from insitu.engine.job_outcome import Outputs
from insitu.engine.probe import Call, Probe
from insitu.graph.cells import Holder
from insitu.graph.context import Casts
from insitu.graph.lines import ShapeSource
from insitu.graph.location import Mark
from insitu.graph.node import Graph

if TYPE_CHECKING:
    from insitu.engine.observed_run import NamedLines, ObservedRun
    from insitu.graph.recording import Recording


@dataclass(eq=False)
class Run:
    """One run of a block.

    Attributes:
        model: the model that runs. Its weights are loaded if they are not there.
        procedure: how it runs.
        lines: what was recorded.
        requests: what each invocation was given.
        demanded: options that a value of the block takes, and the line that reads it; None if
            there are none.
        passes: what each pass does, once it is planned.
        observed: the run, as far as others look at it; None if nobody does.
        outputs: what its passes returned, once it has run; None if the procedure promises none.
        is_stopped: whether a line of the user's ended the run.
        failed: what its invocations raised, none if all have run.
    """

    model: Subject
    procedure: Procedure[Any]
    lines: NamedLines
    requests: Sequence[Any]
    demanded: tuple[Mapping[str, Any], Mark] | None = None
    passes: Sequence[PassPlan] = field(default=(), init=False)
    observed: ObservedRun | None = field(default=None, init=False)
    outputs: Outputs | None = field(default=None, init=False)
    is_stopped: bool = field(default=False, init=False)
    failed: Sequence[FailedInvocations] = field(default=(), init=False)

    def call(self, number: int) -> Call:
        """Returns the first call of the module that an invocation alone would lead to."""
        return self.procedure.example(self.requests[number])

    def probe(self, number: int) -> Probe:
        """Returns a run of that call on fake tensors.

        Raises:
            ShapeError: if the model cannot be run so.
        """
        return self.model.probe(self.call(number), self.procedure.views)


class RecordedBlock(Protocol):
    """A block, as far as its session and its job need it."""

    recording: Recording
    is_dry: bool

    def run(self) -> None:
        """Runs what was recorded, and fills the saved values."""
        ...

    def recorded(self) -> Run:
        """Returns the lines that are to run, once the block has ended."""
        ...

    def came(self, outputs: Outputs | None) -> None:
        """Takes what its run somewhere else returned, beside its saved values."""
        ...


@dataclass(slots=True, eq=False)
class HeldLines:
    """Lines that were recorded before: a block of a job, or what a failure left of a block.

    Attributes:
        graph: the nodes.
        saves: where the run has to put saved values, by the node that saves each.
        casts: the autocast that the block began with.
        dtype: the default dtype that it began with.
        shapes: gives the shapes at sites.
        names: the names of saved values, by the node that saves them.
        order: the place of the block in its job, from 1; 0 if it is in none.
        kept: the nodes whose values later blocks use.
        lent: the nodes whose values are for later blocks alone.
        numbers: the numbers that its invocations have in the block, if it is a part of one.
        fakes: fake values of nodes, as far as anybody has asked.
        as_first_step: as of `Lines`.
        counting: as of `Lines`.
    """

    graph: Graph
    saves: dict[int, Holder]
    casts: Casts
    dtype: torch.dtype
    shapes: ShapeSource | None = None
    names: Mapping[int, str] = field(default_factory=dict[int, str])
    order: int = 0
    kept: Collection[int] = ()
    lent: Collection[int] = ()
    numbers: Sequence[int] | None = None
    fakes: dict[int, Any] = field(default_factory=dict[int, Any])
    as_first_step: bool = False
    counting: AbstractContextManager[Any] | None = None
