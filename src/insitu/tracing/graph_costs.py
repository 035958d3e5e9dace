"""What recorded operations would take: arithmetic, memory and how many they are.

All values are inferred without data. Where the size of one depends on values, the largest that it
can have stands for it, and later values are inferred with that. Where there is no largest, the node
is left out, and a run with limits looks at it when it comes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch._subclasses import FakeTensor

from insitu.engine.budget import Budget
from insitu.engine.counting import Counting
from insitu.engine.largest import largest
from insitu.engine.plan import Plan
from insitu.graph.errors import InsituError, LimitError, UnknownShapeError
from insitu.graph.expression import located
from insitu.graph.fake_tensors import on_fake_tensors
from insitu.graph.lines import Lines
from insitu.graph.node import Ref
from insitu.graph.operations import READ, SAVE
from insitu.graph.shapes import fake_value
from insitu.graph.structure import map_structure, tensors_of


class GraphCosts(NamedTuple):
    """What recorded operations would take.

    Attributes:
        flops: floating-point operations.
        sure: those of them of the nodes whose values have one size, which is known.
        bytes: the most that recorded values hold at once.
        unknown: of how many nodes nothing is known.
        largest: how many are counted with the largest size that they can have.
        known: the nodes whose values have one size, which is known.
        numbers: those of the operations that are as of `Counts.numbers`.
        heaviest: the node that takes most of them, None if there is no node.
    """

    flops: float
    sure: float
    bytes: int
    unknown: int
    largest: int
    known: frozenset[int]
    numbers: float = 0.0
    heaviest: int | None = None


def graph_costs(lines: Lines, plan: Plan, steps: int, budget: Budget | None = None) -> GraphCosts:
    """Infers all values that were recorded, and counts what that takes.

    Args:
        lines: what was recorded. Its values without data are there afterwards.
        plan: which values are needed how often.
        steps: how many steps there are at most.
        budget: what may be spent, None if nothing is limited.

    Raises:
        LimitError: as soon as more is spent, at the line of the operation.
    """
    inferred, meter = _Inferred(lines), _Meter(lines, plan, steps, budget)
    for index in range(len(lines.graph.rows)):
        value = inferred.value(index)
        # At once: a job that takes too much is refused before its later lines are inferred.
        meter.add(index, value, inferred.counting)
    counted, known = len(inferred.estimates.fakes), frozenset(lines.fakes)
    unknown = len(lines.graph.rows) - counted
    sure = sum(meter.each[index] for index in known)
    at_most = counted - len(known)
    heaviest = max(range(len(meter.each)), key=meter.each.__getitem__, default=None)
    return GraphCosts(
        meter.flops, sure, meter.most, unknown, at_most, known, meter.numbers, heaviest
    )


class _Inferred:
    """Values without data, with the largest in the place of those that depend on values."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self.estimates = copy.copy(lines)
        self.estimates.fakes = {}
        self.counting = Counting()

    def value(self, index: int) -> Any:
        """Returns the value of a node, None if nothing is known of it."""
        lines, estimates = self._lines, self.estimates
        reads = lines.graph.rows[index][0] is READ
        self.counting.restart()
        # A forward is counted elsewhere.
        lines.counting = estimates.counting = None if reads else self.counting
        try:
            estimates.fakes[index] = fake_value(lines, index)
        except UnknownShapeError:
            estimates.as_first_step = True  # sizes of later steps are about those of the first
            try:
                estimates.fakes[index] = fake_value(estimates, index)
            except UnknownShapeError:
                self._estimate(index)
            except LimitError:
                raise
            except InsituError:
                pass  # the largest of two values need not go together
            finally:
                estimates.as_first_step = False
        finally:
            lines.counting = estimates.counting = None
        return estimates.fakes.get(index)

    def _estimate(self, index: int) -> None:
        """Lets the largest value that an operation can give stand for the one that it gives."""
        operation, args, kwargs, inputs, _, _ = self._lines.graph.rows[index]
        fakes = self.estimates.fakes
        first = next((one for source in inputs for one in tensors_of(fakes.get(source))), None)
        # Without its inputs nothing can be said of it.
        if not isinstance(first, FakeTensor) or any(source not in fakes for source in inputs):
            return

        def leaf(item: Any) -> Any:
            if type(item) is Ref:
                return fakes[item.index]
            return mode.from_tensor(item) if isinstance(item, torch.Tensor) else item

        mode = first.fake_mode
        try:
            with on_fake_tensors(mode, self.counting):
                given, named = cast("tuple[Any, Any]", map_structure(leaf, (args, dict(kwargs))))
                found = largest(operation.short, given, named)
        except Exception:  # it is not called so, which the run says
            return
        if found is not None:
            fakes[index] = found


class _Meter:
    """Adds up what the nodes of a graph take, in their order."""

    def __init__(self, lines: Lines, plan: Plan, steps: int, budget: Budget | None) -> None:
        self._lines = lines
        self._rows = lines.graph.rows
        self._uses = list(plan.uses)
        self._keeps = lines.graph.differentiates  # autograd may keep all
        self._steps = steps
        self._budget = budget
        self._held: dict[int, tuple[int, int]] = {}  # how many values have a storage, and its bytes
        self._values: dict[int, Sequence[torch.Tensor]] = {}
        self._counted = self._numbers = 0.0
        self._now = 0
        self.each: list[float] = []  # what each node takes
        self.flops = self.numbers = 0.0
        self.most = 0

    def add(self, index: int, value: Any, counting: Counting) -> None:
        """Adds a node, whose value was just inferred."""
        counts = counting.counts
        # Lines of every step run as often as there can be steps.
        times = self._steps if self._lines.graph.repeats_node(index) else 1
        self.each.append((counts.flops - self._counted) * times)
        self.flops += self.each[-1]
        self.numbers += (counts.numbers - self._numbers) * times
        self._counted, self._numbers = counts.flops, counts.numbers
        made = 0
        self._values[index] = found = tensors_of(value)
        for tensor in found:
            # By storage: views of a value take no memory of their own.
            storage = tensor.untyped_storage()
            count, size = self._held.get(id(storage), (0, int(storage.nbytes())))
            self._held[id(storage)] = count + 1, size
            made += 0 if count else size
        # What every step saves is a list of all of them.
        if self._rows[index][0] is SAVE:
            made *= times
        self._now += made
        # What an operation makes on its way is gone after it.
        self.most = max(self.most, self._now + max(counts.peak - counts.left, 0))
        self._check(index, times)
        if not self._keeps:
            self._free(index)

    def _free(self, index: int) -> None:
        for source in (*self._rows[index][3], index):
            self._uses[source] -= source != index
            if self._uses[source] > 0 or source not in self._values:
                continue
            for tensor in self._values.pop(source):
                key = id(tensor.untyped_storage())
                count, size = self._held[key]
                self._held[key] = count - 1, size
                self._now -= 0 if count > 1 else size

    def _check(self, index: int, times: int) -> None:
        if self._budget is None:
            return
        limits = self._budget.limits
        try:
            self._budget.call(times)
            what = f"takes the recorded operations to {self.flops:.3g}"
            limits.check("operations", self.flops, what)
            what = f"takes recorded values to {self.most:,} bytes at once"
            limits.check("peak_bytes", self.most, what)
        except LimitError as error:
            raise located(self._lines.graph, index, error) from None
