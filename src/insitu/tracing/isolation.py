"""What a failure takes from a block, and what of the block is to be run again without it.

What failed is taken out of the graph, with all that uses something of it, and the rest is run as a
block of its own. So its values are those that it has without the others, and nothing is mended.
Where a pass of several invocations fails and nobody knows which of them did, passes are halved.
The runs themselves are in `running.py`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from insitu.batching.procedure import Procedure
from insitu.engine.dependence import Lost
from insitu.engine.failures import Failed, FailedInvocations, Failures, is_out_of_memory
from insitu.engine.fallback import logger
from insitu.engine.job_outcome import Outputs
from insitu.engine.partial_blocks import rest_of
from insitu.graph.cells import Missing
from insitu.tracing.run import HeldLines, Run


def spread_outputs(outputs: Outputs, numbers: Sequence[int], count: int) -> Outputs:
    """Returns what some invocations of a block returned, for each invocation of the block.

    Args:
        outputs: what they returned.
        numbers: their numbers in the block.
        count: how many invocations the block has.
    """
    # Nothing was left out, and padding of the whole is as it was.
    if len(numbers) == count:
        return outputs
    each: list[Any] = [None] * count
    for number, output in zip(numbers, outputs.each, strict=True):
        each[number] = output
    # One output of all would have rows missing in the middle.
    return Outputs(None, each)


class Isolation:
    """Finds what fails in a block, and what has no value because of it.

    Args:
        run: the block, which has run once.
        failures: what failed then.

    Attributes:
        numbers: the invocations that ran last, by their numbers in the block.
        nodes: the nodes that ran last, by their numbers in the block.
        apart: whether each backward pass is to run by itself.
    """

    def __init__(self, run: Run, failures: Failures) -> None:
        self._run = run
        self._dependence = failures.dependence
        self._failed: list[FailedInvocations] = []
        self._lost = Lost()
        self._narrow: Procedure[Any] | None = None  # how halved passes run; None if none are
        self._narrowest = run.procedure
        self._reasons: dict[str, None] = {}
        self._undivided: set[frozenset[int]] = set()
        self._out_of_memory = False
        self._rounds = 0
        self.apart = False
        self.numbers: Sequence[int] = range(len(run.requests))
        self.nodes: Sequence[int] = range(len(run.lines.graph))
        self.take(failures.found)

    @property
    def goes_on(self) -> bool:
        """Whether the next run is to go on where something fails, to find what else does."""
        return self._narrow is not None or self.apart

    def rest(self) -> Run:
        """Returns the rest of the block, to be run as a block of its own."""
        run, lines = self._run, self._run.lines
        rest = rest_of(lines.graph, len(run.requests), self._lost)
        self.numbers, self.nodes = rest.numbers, rest.nodes
        saves = {rest.moved[at]: one for at, one in lines.saves.items() if at in rest.moved}
        part = replace(
            run,
            procedure=self._narrow or run.procedure,
            lines=HeldLines(rest.graph, saves, lines.casts, lines.dtype),
            requests=[run.requests[number] for number in rest.numbers],
        )
        part.observed = None if run.observed is None else run.observed.part(rest.numbers)
        return part

    def take(self, found: Sequence[Failed]) -> None:
        """Takes what failed in the last run, and decides how the rest is run.

        Args:
            found: what failed.
        """
        self._rounds += 1
        found = [self._in_block(failed) for failed in found]
        unknown = list[Failed]()
        for failed in found:
            # Known, or already tried as small as it gets: halving again would give the same.
            if failed.is_known or frozenset(failed.invocations) in self._undivided:
                self._leave_out(failed)
            else:
                unknown.append(failed)
        too_large = [failed for failed in unknown if not self._is_joint(failed)]
        # A backward pass that was one of several is tried alone before anything else is blamed.
        self.apart = len(too_large) < len(unknown)
        if not unknown and self._narrow is None and self._rounds > 1:
            too_large = found  # finding the rest one by one would take a run for each
        elif not (unknown or self._out_of_memory):
            self._narrow = None
        if too_large:
            self._halve(too_large)

    def _is_joint(self, failed: Failed) -> bool:
        """Whether it is enough to run backward passes one by one to know which one fails."""
        return failed.is_backward and not is_out_of_memory(failed.error)

    def _halve(self, too_large: Sequence[Failed]) -> None:
        """Lets passes have half as much as one that failed."""
        requests = [self._run.requests[number] for number in too_large[0].invocations]
        halved = self._narrowest.halved(requests)
        self._narrow = self._narrowest = halved or self._narrowest
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
        self._reasons[reason] = None

    def _leave_out(self, failed: Failed) -> None:
        """Takes what failed out of the block."""
        lost = self._dependence.lost_by(failed.nodes, failed.invocations)
        error = failed.error
        assert error is not None
        blamed = sorted(self._dependence.blamed(failed.nodes, failed.invocations))
        own = sorted(lost.invocations - self._lost.invocations)
        self._failed.append(FailedInvocations(error, blamed, own, lost.nodes - self._lost.nodes))
        self._lost = self._lost | lost
        what = f"invocation {_listed(blamed)}" if blamed else "a line outside of invocations"
        reason = f"{what} raised {type(error).__name__}"
        logger.info("%s: the others are run without it", reason)
        self._reasons[reason] = None

    def ended(self) -> list[FailedInvocations]:
        """Ends the block: says of each value that is not there why, and returns what failed."""
        self._say_missing()
        notes = (*self._reasons,)
        self._run.passes = [single._replace(notes=notes) for single in self._run.passes]
        # In the order of their invocations; those of lines outside of them come last.
        return sorted(self._failed, key=lambda one: one.blamed[0] if one.blamed else 1 << 62)

    def _in_block(self, failed: Failed) -> Failed:
        """What failed in the last run, with the numbers that it has in the block."""
        nodes = [self.nodes[node] for node in failed.nodes]
        invocations = [self.numbers[number] for number in failed.invocations]
        return replace(failed, nodes=nodes, invocations=invocations)

    def _say_missing(self) -> None:
        saves = self._run.lines.saves
        for one in self._failed:
            raised = f"raised {type(one.error).__name__}."
            for index in one.nodes & saves.keys():
                if not one.blamed:
                    reason = f"a line that it uses something of {raised}"
                elif self._dependence.scope(index) in one.blamed:
                    reason = f"its run {raised}"
                else:
                    blamed = _listed(one.blamed)
                    reason = f"it uses something of invocation {blamed}, whose run {raised}"
                saves[index]._put(Missing(reason))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
