"""A run that somebody looks at from outside: what it tells, gives away, and asks.

It is made once for a block, also where its passes are repeated. So a saved value is told once, and
a sink gets it once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from insitu.engine.events import Event, ValueSaved
from insitu.engine.interpose import tapped
from insitu.engine.seams import Seams, Told, seams
from insitu.engine.sinks import SaveKey
from insitu.engine.tree import Tree
from insitu.graph.cells import Holder, Missing
from insitu.graph.errors import CancelledError
from insitu.graph.lines import Lines
from insitu.graph.node import Row, readable
from insitu.graph.operations import KEEP, SAVE, Operation
from insitu.graph.structure import tensors_of

Result = TypeVar("Result")

GIVEN = Missing("it was given to the sink of its run, which has it.")


class Ended(BaseException):
    """Ends a run from outside. No `Exception`, so that neither a model nor a repeat catches it.

    Attributes:
        error: what the run is to raise.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error


class NamedLines(Lines, Protocol):
    """Lines whose saved values have names.

    Attributes:
        names: the names that were given, by the node that saves.
        order: the place of the block in its session, from 1; 0 if it is in none.
    """

    names: Mapping[int, str]
    order: int

    @property
    def numbers(self) -> Sequence[int] | None:
        """The numbers that its invocations have in the block, if it is a part of one."""
        ...

    @property
    def lent(self) -> Collection[int]:
        """The nodes whose values are for later blocks alone."""
        ...

    @property
    def kept(self) -> Collection[int]:
        """The nodes whose values later blocks use as well."""
        ...


class ObservedRun:
    """A block that runs, as far as others look at it.

    Args:
        around: who looks.
        lines: what it has recorded.

    Attributes:
        block: the place of the block in its session or job, from 0.
        numbers: the numbers that its invocations have in the block, if it is run in part.
    """

    def __init__(self, around: Seams, lines: NamedLines) -> None:
        self._around = around
        self.block = max(lines.order - 1, 0)
        self.numbers = lines.numbers
        self._keys = _keys(lines, self.block)
        self._kept = {id(lines.saves[index]) for index in lines.kept if index in lines.saves}
        self._told: set[Told] = set() if around.told is None else around.told
        self._given: set[int] = set()

    def part(self, numbers: Sequence[int]) -> ObservedRun:
        """Returns the same run for some of the block's invocations.

        Args:
            numbers: their numbers in the block.
        """
        found = copy.copy(self)
        whole = self.numbers
        found.numbers = numbers if whole is None else [whole[number] for number in numbers]
        return found

    @property
    def is_listened_to(self) -> bool:
        """Whether somebody wants to hear of events."""
        return bool(self._around.listeners)

    def tell(self, event: Event) -> None:
        """Tells all listeners of an event.

        Args:
            event: the event.

        Raises:
            Ended: if one of them raises.
        """
        for listener in self._around.listeners:
            self._outside(partial(listener, event))

    def check(self, when: str) -> None:
        """Ends the run if it was cancelled.

        Args:
            when: how far the run has come, such as "before its first pass".

        Raises:
            Ended: in that case.
        """
        if any(cancel.is_cancelled for cancel in self._around.cancels):
            raise Ended(CancelledError(f"The run was cancelled {when}; the model is as it was."))

    def check_in_modules(self, tree: Tree) -> ExitStack:
        """Returns a context in which the run also ends before a block of the model is called.

        Args:
            tree: the model's.
        """
        hooks = ExitStack()
        if not self._around.cancels:
            return hooks

        def before(path: str, *_: Any) -> None:
            self.check(f"before `{readable(path)}`")

        with ExitStack() as hung:  # which are taken off too where one cannot be hung
            taps = hung.enter_context(tapped())
            # Blocks alone: hooks on all modules took 6 ms of a job.
            for path in tree.blocks:
                taps.before(tree.modules[path], partial(before, path))
            hooks = hung.pop_all()
        return hooks

    def saves_told(
        self,
        rows: Sequence[Row],
        saves: Mapping[int, Holder],
        uses: Sequence[int],
        holds: Callable[[], bool],
    ) -> list[Row]:
        """Returns nodes that tell of a value that they save, and give it to the sink.

        Args:
            rows: the nodes of a graph: of the block, or of some of its invocations.
            saves: where their values are put.
            uses: how often each node's value is asked for.
            holds: whether the run is valid so far, and not to be made again from the start.
        """
        made = [*rows]
        if not self._around.listeners and self._around.sink is None:
            return made
        for index, holder in saves.items():
            key = self._keys.get(id(holder))
            if key is not None:
                operation, args, kwargs, inputs, nested, mark = rows[index]
                stays, moves = uses[index] > 1 or id(holder) in self._kept, len(args) > 1
                told = self._telling(operation, key, holder, stays, moves, holds)
                operation = replace(operation, function=told)
                made[index] = (operation, args, kwargs, inputs, nested, mark)
        return made

    def _telling(
        self,
        operation: Operation,
        key: SaveKey,
        holder: Holder,
        stays: bool,
        moves: bool,
        holds: Callable[[], bool],
    ) -> Callable[..., Any]:
        """An operation that saves a value, and tells of it."""
        function, sink, step = operation.function, self._around.sink, -1

        def save(*args: Any, **kwargs: Any) -> Any:
            nonlocal step
            value, own = function(*args, **kwargs), key
            if key.step is not None:  # it is saved in every step
                step += 1
                own = key._replace(step=step)
            # The run will be made again, and this is not the value that stays.
            if not holds():
                return value
            told = own.name, own.block, own.step
            # A pass that is repeated saves again what was told before.
            if told not in self._told:
                self._told.add(told)
                if sink is not None:
                    if moves and torch.cuda.is_initialized():  # it may still be on its way
                        torch.cuda.synchronize()
                    self._outside(partial(sink.save, own, value))
                size = sum(tensor.nbytes for tensor in tensors_of(value))
                self.tell(ValueSaved(own, size))
            if sink is None:
                return value
            self._given.add(id(holder))
            return value if stays else GIVEN

        return save

    def left(self, saves: Mapping[int, Holder]) -> dict[int, Holder]:
        """Returns which saved values the run has to hand over, and says of the rest who has them.

        Args:
            saves: where saved values are put.
        """
        found: dict[int, Holder] = {}
        for index, holder in saves.items():
            if id(holder) in self._given and id(holder) not in self._kept:
                holder._put(GIVEN)  # pyright: ignore[reportPrivateUsage]
            else:
                found[index] = holder
        return found

    def _outside(self, call: Callable[[], object]) -> None:
        """Calls somebody outside, whose own runs are none of this one's."""
        # A listener may run a model itself, and is not to be told of that run.
        token = seams.set(None)
        try:
            call()
        except Exception as error:
            raise Ended(error) from None
        finally:
            seams.reset(token)


def run_observed(around: Seams, lines: NamedLines, run: Callable[[ObservedRun], Result]) -> Result:
    """Runs a block that others look at, and raises what ended it from outside.

    Args:
        around: who looks.
        lines: what the block has recorded.
        run: runs it.
    """
    observed = ObservedRun(around, lines)
    if around.told is not None:  # the whole job ends
        return run(observed)
    return unwrapped(partial(run, observed))


def unwrapped(run: Callable[[], Result]) -> Result:
    """Runs something, and raises what ended it from outside.

    Args:
        run: runs it.
    """
    try:
        return run()
    except Ended as ended:
        error = ended.error
    raise error  # out of the `except`: how it came here says nothing


def _keys(lines: NamedLines, block: int) -> dict[int, SaveKey]:
    """The keys of what a block saves, by the identity of where it is put."""
    found: dict[int, SaveKey] = {}
    scopes = lines.graph.invocations()
    for index, row in enumerate(lines.graph.rows):
        if row[0] not in (SAVE, KEEP) or index in lines.lent or index not in lines.saves:
            continue
        name = lines.names.get(index, str(len(found)))
        own = scopes[index]
        invocation = next(iter(own)) if len(own) == 1 else None
        every = lines.graph.repeats_node(index)
        if invocation is not None and lines.numbers is not None:
            invocation = lines.numbers[invocation]
        key = SaveKey(name, block, invocation, 0 if every else None)
        found[id(lines.saves[index])] = key
    return found
