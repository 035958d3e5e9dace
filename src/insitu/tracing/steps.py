"""Steps of a generation: which of them the lines of a block mean.

Step 0 processes the prompt; each later one the token that was chosen before it. Lines mean step 0
unless something here says otherwise.
"""

# What a user gives is checked, whatever its type is said to be.
# pyright: reportPrivateUsage=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch

from insitu.batching.procedure import Procedure
from insitu.graph.errors import BlockError, IndexOutOfRangeError, OptionError
from insitu.graph.intervention import write
from insitu.graph.location import Location, Mark, mark
from insitu.graph.node import EVERY, Address, Kind
from insitu.graph.proxy import Proxy
from insitu.graph.recording import Recording


class Around(Protocol):
    """A block or an edit, as far as its invocations need it.

    Attributes:
        model: whose sites its lines are about.
        recording: what its lines are recorded in.
        procedure: how the model runs.
        is_open: whether its `with` block is being executed.
        in_steps: how many contexts are open that say which step lines mean.
        promises_output: whether `output` is the result of the run and not a proxy.
    """

    model: Any
    recording: Recording
    procedure: Procedure[Any]
    is_open: bool
    in_steps: int
    promises_output: bool

    def demand(self, invocation: Any, options: Mapping[str, Any]) -> None:
        """Lets one of its invocations run with options that it takes for a value to be there."""
        ...


class Stepping(Protocol):
    """An invocation, as far as its steps need it.

    Attributes:
        number: its place among the invocations of the block, from 0.
        current_step: which step of a generation lines mean now.
    """

    number: int
    current_step: int

    @property
    def block(self) -> Around:
        """What it belongs to."""
        ...

    @property
    def most_steps(self) -> int | None:
        """How many steps it may have, None if nothing says so before the run."""
        ...


class AtStep:
    """A context whose lines mean one step, or every step, of some invocations.

    Args:
        invocations: the invocations, all that the block has where none is named.
        step: which step.
    """

    __slots__ = ("_before", "_given", "_invocations", "_start", "_step")

    def __init__(self, invocations: Sequence[Stepping], step: int) -> None:
        self._given = invocations
        self._invocations: Sequence[Stepping] = ()
        self._step = step
        self._before: list[int] = []
        self._start = 0

    def __enter__(self) -> AtStep:
        self._invocations = [*_some(self._given, mark())]
        self._invocations[0].block.in_steps += 1
        self._before = [invocation.current_step for invocation in self._invocations]
        self._start = self._recorded()
        for invocation in self._invocations:
            invocation.current_step = self._step
        self._repeat(self._step == EVERY)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for invocation, step in zip(self._invocations, self._before, strict=True):
            invocation.current_step = step
        self._invocations[0].block.in_steps -= 1
        self._repeat(self._before[0] == EVERY)
        if self._step == EVERY:
            graph = self._invocations[0].block.recording.graph
            # Noted as a range of lines: all that stands between is run in every step.
            graph.repeats = (*graph.repeats, (self._start, self._recorded()))

    def _repeat(self, repeating: bool) -> None:
        """Says whether a value that is saved now becomes a list."""
        self._invocations[0].block.recording.repeating = repeating

    def _recorded(self) -> int:
        return len(self._invocations[0].block.recording.graph)


def _some(invocations: Sequence[Stepping], line: Mark) -> Sequence[Stepping]:
    """Returns invocations of whose steps something is said, if there are any.

    Raises:
        BlockError: if there are none.
    """
    if not invocations:
        raise BlockError(
            "The block has no prompt so far, so there are no steps of it: say which step lines "
            "mean inside of the invocation, `with generator.invoke(prompt) as invoker:` and "
            "`with invoker.step(1):`.",
            Location(*line),
        )
    return invocations


class StepPicker:
    """`invoker.step(2)` or `invoker.step[2]`: a context whose lines mean step 2."""

    __slots__ = ("_invocations", "_steps")

    def __init__(self, invocations: Sequence[Stepping], steps: int | None) -> None:
        self._invocations = invocations
        self._steps = steps

    def __call__(self, step: int) -> AtStep:
        """Returns a context whose lines mean a step."""
        return AtStep(self._invocations, checked_step(step, self._steps, mark()))

    def __getitem__(self, step: int) -> AtStep:
        return AtStep(self._invocations, checked_step(step, self._steps, mark()))


class StepValues(ABC):
    """One value of each step that is no module's: `invoker.tokens`, `invoker.logits`.

    `tokens(2)` and `tokens[2]` read step 2, `tokens()` the step that lines mean here, and
    `tokens[2] = x` replaces the tokens there.
    """

    __slots__ = ("_invocation",)

    def __init__(self, invocation: Stepping) -> None:
        self._invocation = invocation

    def __call__(self, step: int | None = None) -> Proxy:
        """Returns a proxy for the value of a step, without a number of the step meant here."""
        return self._read(self._which(step, mark()), mark())

    def __getitem__(self, step: int) -> Proxy:
        return self._read(self._which(step, mark()), mark())

    def __setitem__(self, step: int, value: Any) -> None:
        self._write(self._which(step, mark()), value, mark())

    def _which(self, step: int | None, line: Mark) -> int:
        invocation = self._invocation
        if not invocation.block.is_open:
            raise BlockError(
                "Tokens and logits of steps are values of the run: read and save them inside the "
                "block.",
                Location(*line),
            )
        if step is None:
            return invocation.current_step
        return checked_step(step, invocation.most_steps, line)

    def _address(self, kind: Kind, step: int) -> Address:
        return (self._invocation.number, "", kind, 0, step)

    @abstractmethod
    def _read(self, step: int, line: Mark) -> Proxy: ...

    @abstractmethod
    def _write(self, step: int, value: Any, line: Mark) -> None: ...


class Tokens(StepValues):
    """The token ids that steps choose, `(rows,)` each."""

    __slots__ = ()

    def _read(self, step: int, line: Mark) -> Proxy:
        block = self._invocation.block
        block.procedure.check_tokens(Location(*line))
        return Proxy(block.recording, block.recording.read(self._address("tokens", step), line))

    def _write(self, step: int, value: Any, line: Mark) -> None:
        block = self._invocation.block
        block.procedure.check_tokens(Location(*line))
        write(block.recording, self._address("choice", step), value, False, line)


class Logits(StepValues):
    """The model's logits for the next token, `(rows, vocabulary)` each, as it returns them."""

    __slots__ = ()

    def _read(self, step: int, line: Mark) -> Proxy:
        output, start = self._output(step, line)
        logits = output.logits[:, -1]
        output._recording.forget_contexts(start)  # a site is read, whatever is around the line
        return logits

    def _write(self, step: int, value: Any, line: Mark) -> None:
        output, start = self._output(step, line)
        logits = output.logits
        # The model returns logits of all positions in step 0, and only the last are for the next
        # token.
        output["logits"] = torch.cat([logits[:, :-1], value[:, None]], 1)
        output._recording.forget_contexts(start)

    def _output(self, step: int, line: Mark) -> tuple[Proxy, int]:
        """What the model returns in a step, and the node behind it."""
        recording = self._invocation.block.recording
        output = Proxy(recording, recording.read(self._address("output", step), line))
        return output, len(recording.graph)


def checked_step(step: int, steps: int | None, line: Mark) -> int:
    """Returns the number of a step.

    Raises:
        OptionError: in a forward, which has no steps; or if it is counted from an end that is not
            known.
        IndexOutOfRangeError: if there will be no such step.
    """
    if steps is None:
        if isinstance(step, int) and not isinstance(step, bool) and step >= 0:
            return step
        raise OptionError(
            f"There is no step {step!r} in a generation without `max_new_tokens`: its steps are "
            "counted from 0, and how many there are is not known before it runs.",
            Location(*line),
        )
    if steps == 1 and step:
        raise OptionError(
            f"There is no step {step}: this run has one step, step 0. A generation has as many as "
            "`max_new_tokens` says.",
            Location(*line),
        )
    if isinstance(step, bool) or not isinstance(step, int) or not -steps <= step < steps:
        raise IndexOutOfRangeError(
            f"There is no step {step!r}: `max_new_tokens={steps}` makes steps 0 to {steps - 1}.",
            Location(*line),
        )
    return step % steps


def each_step(invocations: Sequence[Stepping], steps: int | None, line: Mark) -> Iterator[int]:
    """Returns the numbers of all steps; while one is out, lines mean that step.

    Raises:
        OptionError: if it is not known how many there are.
    """
    if steps is None:
        raise OptionError(
            "How many steps there are is not known before the run: give `max_new_tokens=` to "
            "`generate`, or write `with generator.every_step():`.",
            Location(*line),
        )
    return _rounds(invocations, steps)


def _rounds(invocations: Sequence[Stepping], steps: int) -> Iterator[int]:
    for step in range(steps):
        # Left when the loop asks for the next number, also by `break`: the generator is closed
        # then.
        with AtStep(invocations, step):
            yield step


def next_step(invocations: Sequence[Stepping], steps: int | None, line: Mark) -> int:
    """Lets the lines that come now mean the step after the one that they mean, and returns it."""
    for invocation in _some(invocations, line):
        if invocation.current_step == EVERY:
            raise BlockError(
                "There is no next step in `every_step`: its lines mean all of them.",
                Location(*line),
            )
        # Checked first, so that an error leaves the lines that follow where they were.
        invocation.current_step = checked_step(invocation.current_step + 1, steps, line)
    return invocations[0].current_step
