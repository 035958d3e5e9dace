"""What the passes of a language model do, told to the user."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from insitu.batching.arrangement import Run, rows_by_level
from insitu.batching.procedure import Work
from insitu.graph.node import Address, Place
from insitu.runtime.summary import Summary

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel


class Accounts:
    """Tells what the passes of a run do.

    Args:
        model: the model.
        work: what the passes are for.
        sizes: of each invocation's prompt, how many rows it has and of which length.
    """

    def __init__(self, model: LanguageModel, work: Work, sizes: Sequence[tuple[int, int]]) -> None:
        self._model, self._sizes = model, sizes
        self._moments, self._reads = work.moments, work.plan.reads

    def alone(self, invocation: int, why: str) -> Summary:
        """Returns what a pass of one invocation does.

        Args:
            invocation: its number.
            why: why it has the pass for itself.
        """
        rows, length = self._sizes[invocation]
        reads = [address for address in self._reads if address[0] == invocation]
        return self.whole([invocation], rows, length, reads, None, None, why)

    def whole(
        self,
        invocations: Sequence[int],
        rows: int,
        length: int,
        reads: Sequence[Address],
        through: Place | None,
        logits: int | None,
        why: str,
    ) -> Summary:
        """Returns what a pass from the model's beginning does.

        Args:
            invocations: the numbers of the invocations in it.
            rows: how many rows it has.
            length: how many positions each of them has.
            reads: the sites of which it gives the values.
            through: where it may not have ended before.
            logits: how many positions of each row become logits, None for all.
            why: why these invocations share it.
        """
        costs = self._model.costs
        run, ending = self._blocks_run(reads, through)
        unembedded = rows * self._logits(reads, length if logits is None else logits)
        flops = costs.flops([rows] * run, length, length, unembedded)
        alone = self._alone(invocations)
        return Summary(invocations, rows, length, run, 0, flops, why + ending, alone)

    def resumed(
        self,
        runs: Sequence[Run],
        positions: int,
        reads: Sequence[Address],
        through: Place,
        logits: int | None,
    ) -> Summary:
        """Returns what a pass does that begins at a block.

        Args:
            runs: the runs in it, those first that leave out least.
            positions: how many positions of each row it computes.
            reads: the sites of which it gives the values.
            through: where it may not have ended before.
            logits: how many positions of each row become logits, None for all.
        """
        costs, skipped = self._model.costs, runs[0].level
        run, ending = self._blocks_run(reads, through)
        rows = rows_by_level(runs, costs.blocks)[: max(run - skipped, 0)]
        count = sum(run.rows for run in runs)
        unembedded = count * self._logits(reads, positions if logits is None else logits)
        flops = costs.flops(rows, positions, runs[0].length, unembedded)
        last = max(run.level for run in runs) - 1
        up_to = f"block {last}" if last == skipped - 1 else f"blocks {skipped - 1}-{last}"
        why = f"like their prompt up to {up_to}"
        if positions < runs[0].length:
            why += f" and before position {runs[0].length - positions}"
        invocations = sorted(run.invocation for run in runs)
        alone = self._alone(invocations)
        return Summary(
            invocations, count, positions, len(rows), skipped, flops, why + ending, alone
        )

    def _alone(self, invocations: Sequence[int]) -> Mapping[int, float]:
        """What invocations would cost alone."""
        costs = self._model.costs
        found: dict[int, float] = {}
        for number in invocations:
            rows, length = self._sizes[number]
            found[number] = costs.flops([rows] * costs.blocks, length, length, rows * length)
        return found

    def _logits(self, reads: Collection[Address], positions: int) -> int:
        """How many positions of each row become logits, if the pass comes so far at all."""
        ends = {("", "output", 0), *((path, "output", 0) for path in self._model.unembedding_paths)}
        return positions if any(address[1:4] in ends for address in reads) else 0

    def _blocks_run(self, reads: Sequence[Address], through: Place | None) -> tuple[int, str]:
        """How many blocks a pass goes through before it ends, and why it ends if not at the end."""
        paths = tuple(self._model.block_views[False])
        order = self._moments(reads[0][0] if reads else 0)
        places = [address[1:4] for address in reads] + ([through] if through is not None else [])
        if not paths or order is None or any(place not in order for place in places):
            return len(paths), ""
        last = max((order[place] for place in places), default=-1)
        run = sum(order.get((path, "inputs", 0), -1) < last for path in paths)
        if run == len(paths):
            return run, ""
        return run, f"; nothing is read after {f'block {run - 1}' if run else 'the embeddings'}"
