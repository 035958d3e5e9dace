"""Running again what a failure has taken from invocations that it does not concern.

What failed is taken out of the graph, with all that uses something of it, and the rest is run as a
block of its own. So its values are those that it has without the others, and nothing is mended.
Where a pass of several invocations fails and nobody knows which of them did, passes are halved.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from insitu.batching.pass_plan import PassPlan, renumbered
from insitu.batching.procedure import Outputs, Procedure, Subject
from insitu.engine.dependence import Dependence, Lost
from insitu.engine.failures import Failed, FailedInvocations, Failures, is_out_of_memory
from insitu.engine.fallback import logger
from insitu.engine.plan import Plan
from insitu.graph.bounds import counting
from insitu.graph.cells import Holder, Missing
from insitu.graph.context import Casts
from insitu.graph.lines import Lines, ShapeSource
from insitu.graph.node import Graph
from insitu.graph.renumbering import add_nodes
from insitu.tracing.one_run import Ran, run_once

if TYPE_CHECKING:
    from insitu.engine.observed_run import ObservedRun


class _Rest:
    """The lines of some invocations of a block: a `Lines`.

    Args:
        lines: what the block has recorded.
        lost: what of it is left out.
        count: how many invocations the block has.

    Attributes:
        numbers: the invocations that are left, by their numbers in the block.
        nodes: the nodes that are left, likewise.
    """

    as_first_step = False
    counting: AbstractContextManager[Any] | None = None

    def __init__(self, lines: Lines, lost: Lost, count: int) -> None:
        self.graph = Graph([])
        self.numbers = [number for number in range(count) if number not in lost.invocations]
        own = {number: at for at, number in enumerate(self.numbers)}
        kept = [index for index in range(len(lines.graph)) if index not in lost.nodes]
        moved = add_nodes(self.graph, lines.graph, kept, own)
        self.nodes = kept
        self.saves: dict[int, Holder] = {
            moved[index]: holder for index, holder in lines.saves.items() if index in moved
        }
        self.shapes: ShapeSource | None = None
        self.fakes: dict[int, Any] = {}
        self.casts: Casts = lines.casts
        self.dtype: torch.dtype = lines.dtype


class _Isolation:
    """Finds what fails in a block, and what has no value because of it.

    Args:
        procedure: how the block runs.
        lines: what it has recorded.
        requests: what its invocations were given.
        dependence: which of its nodes and invocations use which.

    Attributes:
        failed: what has failed so far.
        lost: what has no value.
        narrow: how the passes run that are halved; None if none are.
        apart: whether each backward pass runs by itself.
        reasons: why it was run again, for the plan.
    """

    def __init__(
        self,
        procedure: Procedure[Any],
        lines: Lines,
        requests: Sequence[Any],
        dependence: Dependence,
    ) -> None:
        self._requests = requests
        self._dependence = dependence
        self._graph = lines.graph
        self.failed: list[FailedInvocations] = []
        self.lost = Lost()
        self.narrow: Procedure[Any] | None = None
        self.apart = False
        self.reasons: dict[str, None] = {}
        self._narrowest = procedure
        self._undivided: set[frozenset[int]] = set()
        self._out_of_memory = False
        self._rounds = 0

    def take(self, found: Sequence[Failed], rest: _Rest | None) -> None:
        """Takes what failed in a run, and decides how the rest is run.

        Args:
            found: what failed.
            rest: what was run; None if that was the whole block.
        """
        self._rounds += 1
        if rest is not None:
            found = [_in_block(failed, rest) for failed in found]
        unknown = list[Failed]()
        for failed in found:
            if failed.is_known or frozenset(failed.invocations) in self._undivided:
                self._leave_out(failed)
            else:
                unknown.append(failed)
        too_large = [failed for failed in unknown if not self._is_joint(failed)]
        self.apart = len(too_large) < len(unknown)
        if not unknown and self.narrow is None and self._rounds > 1:
            too_large = found  # finding the rest one by one would take a run for each
        elif not (unknown or self._out_of_memory):
            self.narrow = None
        if too_large:
            self._halve(too_large)

    def _is_joint(self, failed: Failed) -> bool:
        """Whether it is enough to run backward passes one by one to know which one fails."""
        return failed.is_backward and not is_out_of_memory(failed.error)

    def _halve(self, too_large: Sequence[Failed]) -> None:
        """Lets passes have half as much as one that failed."""
        requests = [self._requests[number] for number in too_large[0].invocations]
        halved = self._narrowest.halved(requests)
        self.narrow = self._narrowest = halved or self._narrowest
        for failed in too_large:
            if failed.is_known:
                continue
            if halved is None:  # nothing is left to divide
                self._leave_out(failed)
                continue
            self._undivided.add(frozenset(failed.invocations))
            self._say_halved(failed)
        gc.collect()  # what failed may be in cycles with its frames

    def _say_halved(self, failed: Failed) -> None:
        """Says why passes are run again in halves."""
        count, error = len(failed.invocations), failed.error
        if is_out_of_memory(error):
            self._out_of_memory = True
            reason = f"memory ran out in a pass of {count} invocations"
            logger.warning("%s: it is run again in halves", reason)
        else:
            what = f"{type(error).__name__}: {_first_line(error)}"
            reason = f"a pass of {count} invocations raised {what}"
            logger.info("%s: it is run again in halves", reason)
        self.reasons[reason] = None

    def _leave_out(self, failed: Failed) -> None:
        """Takes what failed out of the block."""
        lost = self._dependence.lost_by(failed.nodes, failed.invocations)
        error = failed.error
        assert error is not None
        blamed = sorted(self._dependence.blamed(failed.nodes, failed.invocations))
        own = sorted(lost.invocations - self.lost.invocations)
        self.failed.append(FailedInvocations(error, blamed, own, lost.nodes - self.lost.nodes))
        self.lost = Lost(self.lost.nodes | lost.nodes, self.lost.invocations | lost.invocations)
        what = f"invocation {_listed(blamed)}" if blamed else "a line outside of invocations"
        reason = f"{what} raised {type(error).__name__}"
        logger.info("%s: the others are run without it", reason)
        self.reasons[reason] = None


def run_rest(
    model: Subject,
    procedure: Procedure[Any],
    lines: Lines,
    requests: Sequence[Any],
    planned: list[PassPlan],
    failures: Failures,
    plan: Plan,
    results: list[Any],
    observed: ObservedRun | None,
) -> Ran:
    """Runs what is left of a block in which something failed, and fills the saved values.

    Args:
        model: the model.
        procedure: how the block runs.
        lines: what it has recorded.
        requests: what each invocation was given.
        planned: as of `run_block`.
        failures: what failed.
        plan: how it was run.
        results: what its passes returned.
        observed: the run, as far as others look at it; None if nobody does.
    """
    count = len(requests)
    state = _Isolation(procedure, lines, requests, failures.dependence)
    state.take(failures.found, None)
    rest: _Rest | None = None
    spoiled = failures.is_spoiled
    ran = requests
    while spoiled:
        rest = _Rest(lines, state.lost, count)
        if not rest.numbers:
            results, ran = [], []
            break
        ran = [requests[number] for number in rest.numbers]
        again = Failures(rest.graph, goes_on=state.narrow is not None or state.apart)
        budget = counting.get()
        with nullcontext() if budget is None else budget.part(rest.nodes):
            plan, results = run_once(
                model,
                state.narrow or procedure,
                rest,
                ran,
                model.snapshot.root,
                planned,
                again,
                None if observed is None else observed.part(rest.numbers),
                state.apart,
            )
        planned[:] = [renumbered(single, rest.numbers) for single in planned]
        spoiled = again.is_spoiled
        if again.found:
            state.take(again.found, rest)
    _say_missing(lines, state.failed, failures.dependence)
    numbers = range(count) if rest is None else rest.numbers
    notes = (*state.reasons,)
    planned[:] = [single._replace(notes=notes) for single in planned]
    stopped = plan.stops and len(ran) == 1
    outputs = None if stopped or not ran else procedure.outputs(results, ran)
    return Ran(plan, outputs and _of_block(outputs, numbers, count), _ordered(state.failed))


def _in_block(failed: Failed, rest: _Rest) -> Failed:
    """What failed in a part of a block, with the numbers that it has in the block."""
    nodes = [rest.nodes[node] for node in failed.nodes]
    return replace(
        failed, nodes=nodes, invocations=[rest.numbers[number] for number in failed.invocations]
    )


def _say_missing(lines: Lines, failed: Sequence[FailedInvocations], dependence: Dependence) -> None:
    """Says of each value that is not there why."""
    for one in failed:
        raised = f"raised {type(one.error).__name__}."
        for index in one.nodes & lines.saves.keys():
            if not one.blamed:
                reason = f"a line that it uses something of {raised}"
            elif dependence.scope(index) in one.blamed:
                reason = f"its run {raised}"
            else:
                reason = (
                    f"it uses something of invocation {_listed(one.blamed)}, whose run {raised}"
                )
            lines.saves[index]._put(Missing(reason))  # pyright: ignore[reportPrivateUsage]


def _ordered(failed: Sequence[FailedInvocations]) -> list[FailedInvocations]:
    """Failures in the order of their invocations; those of lines outside of them come last."""
    return sorted(failed, key=lambda one: one.blamed[0] if one.blamed else 1 << 62)


def _of_block(outputs: Outputs, numbers: Sequence[int], count: int) -> Outputs:
    """What a part of a block has returned, for each invocation of the block."""
    if len(numbers) == count:
        return outputs
    each: list[Any] = [None] * count
    for number, output in zip(numbers, outputs.each, strict=True):
        each[number] = output
    return Outputs(None, each)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
