"""Runs the nodes of a graph as the values that they wait for arrive.

An execution holds the values of one run. It knows nothing of modules or hooks: a pass tells it what
arrived, and it runs the nodes that have become possible and drops values that are used up.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from sys import getrefcount
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from insitu.engine.draws import Draws
from insitu.engine.failures import operation_error
from insitu.engine.gradient_binding import Path
from insitu.engine.gradients import Tape
from insitu.engine.order import too_early
from insitu.engine.plan import Plan
from insitu.graph.bounds import Counter, counting
from insitu.graph.cells import Holder
from insitu.graph.errors import InsituError
from insitu.graph.evaluation import resolved
from insitu.graph.expression import located
from insitu.graph.node import Graph, Ref, Row
from insitu.graph.operations import APPLY
from insitu.graph.saved import ALONE, SavedTensor, set_class, spent, swap
from insitu.graph.saved_proxy import SavedProxy
from insitu.graph.structure import apart_from

if TYPE_CHECKING:
    from insitu.engine.observed_passes import ObservedPasses

NO_MODULES: Mapping[str, nn.Module] = MappingProxyType({})
_PENDING = object()


class Execution:
    """The values of one run of a graph.

    Args:
        graph: the recorded experiment.
        plan: its plan.
        modules: the model's modules, by path.

    Attributes:
        graph: as of the arguments, and so are `plan` and `modules`.
        differentiates: whether the run has to record autograd.
        busy: whether calls of the model's modules are no part of the run: an operation is running
            that may make some, or a line has failed.
        ended: the invocations that have no further steps, with how many they had.
        tape: what autograd is asked for, if anything is.
        renewed: the nodes whose values are made new tensors, so that they have gradients.
        failing: the nodes that may have failed, if one has.
        raised: what the pass raises when the model has ended, even if the model catches it.
        observed: who looks at the run, None if nobody does.
    """

    busy = False
    failing: Sequence[int] = ()
    raised: Exception | None = None
    ended: Mapping[int, int] = MappingProxyType({})
    tape: Tape | None = None
    observed: ObservedPasses | None = None
    _counter: Counter | None = None
    _arrived = 0
    _steps: Mapping[int, list[Any]] = MappingProxyType({})
    renewed: Mapping[int, object] = MappingProxyType({})
    # A group of nodes that needs several sites waits at one that has not arrived; when that one
    # arrives it runs, or waits at another.
    _waiting: dict[int, list[int]] = {}  # noqa: RUF012 (not written to: who waits has its own)

    def __init__(
        self, graph: Graph, plan: Plan, modules: Mapping[str, nn.Module] = NO_MODULES
    ) -> None:
        self.graph = graph
        self._rows = graph.rows
        self.modules = modules
        self.plan = plan
        self._bits = plan.bits
        self._groups = plan.groups
        self._uses = plan.uses.copy()
        self._values: list[Any] = [None] * len(self._uses)
        self.differentiates = graph.differentiates
        if graph.contexts or not plan.plain:
            self._make_ready(graph, plan)
        counter = counting.get()
        if counter is not None:  # the run has limits
            self._counter = counter
            self._rows = counter.rows(self._rows)

    def _make_ready(self, graph: Graph, plan: Plan) -> None:
        """Makes ready for what few graphs have."""
        if graph.contexts:
            self._rows = graph.runnable()
        if plan.reused:
            self._rows = [*self._rows]
            for index, operation in plan.reused.items():
                self._rows[index] = (operation, *self._rows[index][1:])
        if plan.writes or plan.skips:
            for index in (*plan.writes.values(), *plan.skips.values()):
                self._values[index] = _PENDING
        if plan.repeated is not None:
            self._steps = {index: [] for index in plan.repeated.saves}
            for index in plan.repeated.saves:
                self._values[index] = _PENDING
        if plan.gradients is not None:
            self.renewed = plan.gradients.renewed
            root = self.modules.get("")
            changed = plan.writes
            self.tape = Tape(graph, plan.gradients, changed, self._come, self._gradient, root)
        if plan.held:
            self._wait()

    def draw_from(self, seeds: Mapping[int, int]) -> None:
        """Lets the lines of invocations draw from seeds.

        Args:
            seeds: the seeds, by the numbers of the invocations.
        """
        self._rows = Draws(seeds).rows(self.plan.drawing, self._rows)

    def observe(
        self, observed: ObservedPasses, telling: Callable[[Sequence[Row]], list[Row]]
    ) -> None:
        """Lets others look at the run: `telling` gives nodes that tell of what they save."""
        self.observed, self._rows = observed, telling(self._rows)

    def arrive(self, index: int, value: Any) -> None:
        """Takes what arrived at a site, and runs every node that has been waiting for it.

        Args:
            index: the node that reads the site.
            value: what arrived, as `made_new` gives it.

        Raises:
            ShapeError, ExecutionError: if an operation fails, pointing at its line.
        """
        rows, values, uses, tape = self._rows, self._values, self._uses, self.tape
        if tape is not None:
            value = tape.note(index, value)
        values[index] = value
        bit = self._bits[index]
        possible = self._groups.get(bit, ())
        if self._waiting:
            possible = self._completed(bit, possible)
        for step in possible:
            operation, args, kwargs, inputs, nested, _ = rows[step]
            function = operation.function
            try:
                # Calls without keywords and containers, of up to three arguments, are the most, and
                # a comprehension takes as long as the rest of this loop.
                if nested:
                    args, kwargs = self.resolved(args, kwargs)
                    self.busy = True
                    result = function(*args, **kwargs)
                    self.busy = False
                elif kwargs:
                    args = [values[arg.index] if type(arg) is Ref else arg for arg in args]
                    result = function(*args, **kwargs)
                elif len(args) == 1:
                    result = function(values[args[0].index])
                elif len(args) == 2:
                    first, second = args
                    result = function(
                        values[first.index] if type(first) is Ref else first,
                        values[second.index] if type(second) is Ref else second,
                    )
                elif len(args) == 3:
                    first, second, third = args
                    result = function(
                        values[first.index] if type(first) is Ref else first,
                        values[second.index] if type(second) is Ref else second,
                        values[third.index] if type(third) is Ref else third,
                    )
                else:
                    result = function(
                        *[values[arg.index] if type(arg) is Ref else arg for arg in args]
                    )
            except Exception as error:
                self.busy = False
                self.failing = (step,)
                if isinstance(error, InsituError) and error.location is not None:
                    raise
                cause = None if isinstance(error, InsituError) else error  # it is said once
                raise operation_error(self.graph, values, step, error) from cause
            if tape is not None:
                if step in self.renewed:
                    result = tape.renewed(step, result)
                result = tape.note(step, result)
                if operation.name == APPLY.name:  # it may write into what it is given
                    tape.rewritten(args)
            for source in inputs:
                uses[source] -= 1
                if not uses[source]:
                    values[source] = None
            if uses[step]:
                values[step] = result
        if not uses[index]:
            values[index] = None
        if self._waiting:
            self._keep(bit, value)

    def begin(self, start: int) -> None:
        """Runs the nodes that wait for no site: they use values of earlier blocks alone.

        Args:
            start: the plan's `start`.

        Raises:
            ShapeError, ExecutionError: as of `arrive`.
        """
        with torch.set_grad_enabled(self.differentiates):
            self.arrive(start, None)

    def fail(self, error: Exception) -> None:
        """Notes what a line has raised, or putting its value where it goes. Nothing more arrives.

        Args:
            error: what was raised, inside of the model: it may catch that, or raise another.
        """
        if self.raised is None:
            self.raised = error
        self.busy = True

    def made_new(self, found: Sequence[tuple[int, int]], value: Any) -> Any:
        """Returns what arrived at a place with new tensors where gradients are wanted.

        The lines and the model go on with these.

        Args:
            found: the nodes that read it, each with its invocation.
            value: what arrived.
        """
        done: set[Path] = set()
        for index, _ in found:
            if index in self.renewed and self.tape is not None:
                value = self.tape.renewed(index, value, done)
        return value

    def _completed(self, bit: int, possible: Sequence[int]) -> Sequence[int]:
        """Adds to what a site's arrival makes possible what needed other sites too, in order."""
        self._arrived |= bit
        ready = [possible]
        for need in self._waiting.pop(bit, ()):
            missing = need & ~self._arrived
            if missing:
                self._waiting.setdefault(missing & -missing, []).append(need)
            else:
                ready.append(self._groups[need])
        return possible if len(ready) == 1 else sorted(chain.from_iterable(ready))

    def written(self, index: int) -> Any:
        """Returns what a write puts at its site.

        Args:
            index: the node that reads the site.

        Raises:
            CausalityError: if the value depends on what has not arrived yet.
        """
        return self._handed_over(index, self.plan.writes[index])

    def standing(self, index: int) -> Any:
        """Returns what a write is about to put at a site.

        Args:
            index: the node that reads the site.

        Raises:
            CausalityError: if the value depends on what has not arrived yet.
        """
        self._uses[self.plan.writes[index]] += 1
        return self.written(index)

    def skipped(self, index: int) -> Any:
        """Returns what stands for the output of a module that is skipped.

        Args:
            index: the node that reads its arguments.

        Raises:
            CausalityError: if the value depends on what has not arrived yet.
        """
        return self._handed_over(index, self.plan.skips[index])

    def _handed_over(self, read: int, node: int) -> Any:
        """What the model gets at a site, from the node that makes it."""
        value = self._values[node]
        if value is _PENDING:
            self.failing = (node,)
            missing = self.plan.needs[node] & ~self._arrived
            raise too_early(self.graph, self.plan, read, node, missing, self.ended)
        self._uses[node] -= 1
        if not self._uses[node]:
            self._values[node] = None
        return value

    def checked(self, index: int, make: Callable[[], Any]) -> Any:
        """Returns what a function makes of the value of a skip; its errors get the skip's line.

        Args:
            index: the node that reads the arguments of the module.
            make: the function.
        """
        try:
            return make()
        except InsituError as error:
            self.failing = (self.plan.skips[index],)
            raise located(self.graph, self.plan.skips[index], error) from error

    def next_step(self) -> None:
        """Ends a step of a run, also the last: keeps what it saves, and makes ready for another."""
        if self._counter is not None:
            self._counter.tick()
        repeated = self.plan.repeated
        if repeated is None:
            return
        values, uses = self._values, self._uses
        for index in repeated.saves:
            if values[index] is not _PENDING:
                self._steps[index].append(values[index])
        if self.tape is not None:
            self.tape.done.difference_update(repeated.nodes)
        for index in repeated.nodes:
            values[index] = None
            uses[index] = self.plan.uses[index]
        handed_over = (*self.plan.writes.values(), *self.plan.skips.values())
        for index in (*repeated.saves, *handed_over):
            if self.plan.needs[index] & repeated.sites:
                values[index] = _PENDING
        self._arrived &= ~repeated.sites
        self._wait()

    def _wait(self) -> None:
        """Lets each group that needs several sites wait for one that has not arrived."""
        self._waiting = {}
        for need in self._groups:
            missing = need & ~self._arrived
            if missing and need & (need - 1):
                self._waiting.setdefault(missing & -missing, []).append(need)

    def fill(self, saves: Mapping[int, Holder]) -> None:
        """Hands the saved values over."""
        values = self._values
        if self._steps:
            values = [self._steps.get(index, value) for index, value in enumerate(values)]
        for index, holder in saves.items():
            value = values[index]
            # Most are: as `holder._put` does, but for two calls.
            if type(value) is _TENSOR and type(holder) is SavedProxy and not value.requires_grad:
                holder.__dict__.clear()
                swap(holder, value)
                set_class(holder, SavedTensor)
                if getrefcount(value) == ALONE:
                    spent.append(value)
            else:
                holder._put(value)
        if self.plan.moves and torch.cuda.is_initialized():  # copies may still be on their way
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)

    def resolved(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """Returns the arguments of a node, with values in the place of references."""
        return resolved(args, kwargs, self._values, self.modules.__getitem__)

    def _come(self, index: int, value: torch.Tensor) -> None:
        """Takes a gradient."""
        self.arrive(index, self.made_new([(index, 0)], value))

    def _gradient(self, index: int, value: torch.Tensor) -> Any:
        """Takes a gradient on its way, and returns what goes on in its place, or None."""
        self._come(index, value)
        return self.written(index) if index in self.plan.writes else None

    def _use(self, index: int) -> None:
        self._uses[index] -= 1
        if not self._uses[index]:
            self._values[index] = None

    def _keep(self, bit: int, arrived: Any) -> None:
        """Copies values that wait for other sites, so that the model's own writes miss them.

        Modules may write into what they returned or were given (`nn.ReLU(inplace=True)`, a
        residual stream added up in place). Only memory that came from the model is copied.
        """
        held = [index for index in self.plan.held.get(bit, ()) if self._uses[index]]
        if not held:
            return
        for index in held:
            self._values[index] = apart_from(arrived, self._values[index])


_TENSOR = torch.Tensor
