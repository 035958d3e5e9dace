"""The passes of a run that somebody looks at from outside: the events while they run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from insitu.engine.events import PassEnded, PassStarted, StepStarted, TokensChosen
from insitu.engine.observed_run import ObservedRun


class ObservedPasses:
    """The passes of an observed run.

    Args:
        run: the run.
        invocations: the invocations of each.
        costs: what each costs beside the others.
    """

    def __init__(
        self,
        run: ObservedRun,
        invocations: Sequence[Sequence[int]],
        costs: Sequence[float],
    ) -> None:
        self._run, self._block, self._numbers = run, run.block, run.numbers
        self._invocations, self._costs = invocations, costs
        self._total = sum(costs) or 1.0
        self._spent = 0.0
        self._ran = 0

    def begins(self, number: int) -> None:
        """Is told that a pass begins.

        Args:
            number: its number.

        Raises:
            Ended: if the run was cancelled, or a listener raises.
        """
        self._run.check(f"after {self._ran} of {len(self._costs)} passes")
        self._run.tell(PassStarted(*self._of(number)))

    def ended(self, number: int) -> None:
        """Is told that a pass has ended.

        Args:
            number: its number.

        Raises:
            Ended: if a listener raises.
        """
        self._ran += 1
        self._spent += self._costs[number]
        self._run.tell(PassEnded(*self._of(number)))

    def step_begins(self, step: int, invocations: Sequence[int]) -> None:
        """Is told that a step of a generation begins.

        Args:
            step: which.
            invocations: those that go on in it.

        Raises:
            Ended: if the run was cancelled, or a listener raises.
        """
        self._run.check(f"before step {step} of a generation")
        self._run.tell(StepStarted(self._block, self._named(invocations), step))

    def backward_begins(self) -> None:
        """Is told that a backward pass begins.

        Raises:
            Ended: if the run was cancelled.
        """
        self._run.check("before a backward pass")

    def chosen(self, invocation: int, step: int, ids: torch.Tensor) -> None:
        """Is told which tokens a step has chosen.

        Args:
            invocation: whose they are.
            step: which step.
            ids: the token of each row, `(rows,)`.

        Raises:
            Ended: if a listener raises.
        """
        if self._run.is_listened_to:
            (number,) = self._named([invocation])
            self._run.tell(TokensChosen(self._block, number, step, tuple(map(int, ids))))

    def _named(self, invocations: Sequence[int]) -> Sequence[int]:
        """Invocations by the numbers that they have in the block."""
        if self._numbers is None:
            return tuple(invocations)
        return tuple(self._numbers[number] for number in invocations)

    def _of(self, number: int) -> tuple[int, int, int, Sequence[int], float]:
        own = self._named(self._invocations[number])
        return self._block, number, len(self._costs), own, self._spent / self._total
