"""Invocations: one prompt, the reads while the model processes it, and which one is current.

An invocation is current for the code that its `with` statement encloses, and for functions called
from there. A `ContextVar` alone cannot say that: a generator that is suspended inside a `with`
block leaves the variable set for its caller. So each open invocation also knows the frame that its
`with` statement stands in, and it is current only while that frame is on the stack.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from sys import _getframe
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, cast

import torch

from insitu.engine.functions import Called
from insitu.engine.probe import Call, Probe
from insitu.graph.errors import BlockError, NoValueError, PathError
from insitu.graph.intervention import skip, write
from insitu.graph.location import Location, Mark, here, mark, user_frame
from insitu.graph.node import EVERY, NO_KWARGS, Address, Kind, Ref, Site, ref
from insitu.graph.operations import READ
from insitu.graph.proxy import Proxy, StructureProxy
from insitu.graph.recorded import inside_function
from insitu.habits import OF_BLOCKS, habit
from insitu.tracing.site_shapes import arriving_at, called_in
from insitu.tracing.steps import Around, AtStep, Logits, StepPicker, Tokens, each_step, next_step


class Invocation:
    """What `tracer.invoke(prompt)` gives: a context in which sites mean this prompt's values.

    Attributes:
        block: the block, or the edit, that it belongs to.
        model: whose sites it gives a meaning.
        number: its place among the invocations of the block, from 0.
        request: what the model is called with.
        current_step: which step of a generation lines mean now.
        result: what the run returned for it, where the block promises an output.
    """

    __slots__ = (
        *("__weakref__", "_owner", "_probe", "_reads", "_recording", "_thread", "_views"),
        *("block", "current_step", "model", "number", "request", "result"),
    )

    def __init__(self, block: Around, number: int, request: Any, model: object = None) -> None:
        self._owner: FrameType | None = None
        self.model = block.model if model is None else model
        self._recording = recording = block.recording
        self._views = block.procedure.views
        self.block = block
        self.number = number
        self.request = request
        self._reads: dict[Address, Ref] = recording.sites
        self.current_step = 0
        self._probe: Probe | None = None
        self.result: Any = None

    def __enter__(self) -> Invocation:
        if not self.block.is_open:
            raise BlockError(
                "An invocation belongs inside its block: write `with model.trace() as tracer:` "
                "around `with tracer.invoke(prompt):`.",
                here(),
            )
        self.enter(user_frame(2))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()

    def enter(self, frame: FrameType) -> None:
        """Opens the context.

        Args:
            frame: the frame whose `with` statement this is.
        """
        if frame.f_code.co_flags & _GENERATOR:
            frame = _entering_frame(frame)
        self._owner = frame
        self._thread = get_ident()
        _open.set((*_open.get(), self))

    def leave(self) -> None:
        """Closes it if it is open. Any frame, thread or context may do so."""
        if self._owner is None:
            return
        self._owner = None
        invocations = _open.get()
        if len(invocations) == 1 and invocations[0] is self:
            _open.set(())
        else:
            _open.set(tuple(one for one in invocations if one._owner is not None))

    def read(self, path: str, kind: Kind, mark: Mark, call: int = 0) -> Proxy:
        """Returns a proxy for the value of a module in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            mark: the user's line.
            call: in which call of the module.
        """
        recording = self._recording
        address = (self.number, path, kind, call, self.current_step)
        source = self._reads.get(address)
        if source is None:
            if recording.graph.writes:
                source = recording.first_read(address, mark)
            else:  # what that does, without the call: most sites are read once
                rows = recording.graph.rows
                source = self._reads[address] = ref(len(rows))
                rows.append((READ, address, NO_KWARGS, (), False, mark))
        elif self.current_step == EVERY:  # a single step may have overtaken it
            source = recording.read(address, mark)
        if kind == "output" and path in self._views:
            return StructureProxy(recording, source)
        return Proxy(recording, source)

    def write(self, path: str, kind: Kind, value: Any, mark: Mark, call: int = 0) -> None:
        """Puts a value in the place of a module's own, in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            value: recorded values, constants, or containers of both.
            mark: the user's line.
            call: in which call of the module.
        """
        address = (self.number, path, kind, call, self.current_step)
        write(self._recording, address, value, kind == "output" and path in self._views, mark)

    def demand(self, options: Mapping[str, Any]) -> None:
        """Lets the prompt be processed with options that it takes for a value to be there.

        Args:
            options: such as which implementation of attention.
        """
        self.block.demand(self, options)

    @property
    def call(self) -> Call:
        """The first call of the module that it would lead to alone."""
        return self.block.procedure.example(self.request)

    def forget_shapes(self) -> None:
        """Forgets the shapes that are known of the run, since it will run otherwise."""
        self._probe = None

    def skip(self, path: str, value: Any, mark: Mark, call: int = 0) -> None:
        """Lets a value stand for a module's output, and the module not run.

        Args:
            path: the module's path.
            value: recorded values, constants, or containers of both.
            mark: the user's line.
            call: in which call of the module.
        """
        if path in self._views and not isinstance(value, tuple | StructureProxy):
            value = (value,)
        skip(self._recording, (self.number, path, "output", call, self.current_step), value, mark)

    def stop(self, path: str, mark: Mark, call: int = 0) -> None:
        """Lets the run end after a module.

        Args:
            path: the module's path.
            mark: the user's line.
            call: after which call of the module.
        """
        address = (self.number, path, "output", call, self.current_step)
        recording = self._recording
        if recording.suspended:
            raise inside_function(Location(*mark))
        recording.stop(recording.read(address, mark), mark)

    @property
    def most_steps(self) -> int | None:
        """How many steps it may have, None if nothing says so before the run."""
        return self.block.procedure.steps_of(self.request)

    @property
    def step(self) -> StepPicker:
        """`invoker.step(2)` or `invoker.step[2]`: a context whose lines mean step 2.

        Step 0 processes the prompt, and lines mean it unless told otherwise.
        """
        return StepPicker([self], self.most_steps)

    @property
    def steps(self) -> Iterator[int]:
        """The numbers of all steps, for a loop in whose rounds lines mean that step."""
        return each_step([self], self.most_steps, mark())

    def every_step(self) -> AtStep:
        """Returns a context whose lines are recorded once and run in every step.

        A value saved in it becomes a list, with one for each step in which there was one.
        """
        return AtStep([self], EVERY)

    def next(self) -> int:
        """Lets the lines that come now mean the step after the present one; returns its number."""
        return next_step([self], self.most_steps, mark())

    @property
    def tokens(self) -> Tokens:
        """The token ids that steps choose: `tokens(2)`, or `tokens[2] = x` to choose another.

        A replacement may depend on all that comes before the choice. `(rows,)`, int64.
        """
        return Tokens(self)

    @property
    def logits(self) -> Logits:
        """What the model returns for the next token: `logits(2)`, or `logits[2] = x`.

        `(rows, vocabulary)`, before logits processors; under beam search, a row a beam.
        """
        return Logits(self)

    @property
    def output(self) -> Any:
        """What the model returns for this prompt alone, without padding.

        In a trace, a proxy like any other. In a generation, the token ids `(rows, position)` of
        prompt and continuation, there once the model has run.

        Raises:
            NoValueError: in a generation, before the model has run.
        """
        if not self.block.promises_output:
            if self.block.is_open:
                return self.read("", "output", mark())
            raise BlockError(
                "`invoker.output` is a value of the run: read and save it inside the block.", here()
            )
        if self.result is None:
            reason = " yet: the model runs when the outermost `with` block ends"
            if not self._recording.open:
                reason = ": its run failed, or `stop` ended it"
            raise NoValueError(f"`invoker.output` has no value{reason}.", here())
        return self.result

    @property
    def ids(self) -> torch.Tensor:
        """The token ids that the prompt became, `(rows, position)`.

        Raises:
            PromptError: if it was given as embeddings.
        """
        return self.request.token_ids

    @property
    def mask(self) -> torch.Tensor:
        """Which positions of `ids` hold tokens (1) and which padding (0), `(rows, position)`.

        There is padding only where several prompts of different length were given as one: before
        them where the model looks back only, so that each row ends in a token, else behind them.
        """
        return self.request.visible_mask

    def called(self, path: str) -> Sequence[Called]:
        """Returns the torch functions that a module's forward calls, with fake tensors.

        Raises:
            ShapeError: if the model cannot be run on fake tensors.
        """
        block = self.block
        return called_in(block.model, block.procedure, self.request, path)

    def fake(self, site: Site) -> Any:
        """Returns what will arrive at a site, as fake tensors; one fake run answers for all."""
        block = self.block
        probe = self._probe
        if probe is None:
            procedure = block.procedure
            example = procedure.example(self.request)
            self._probe = probe = cast(Probe, block.model.probe(example, procedure.views))
        return arriving_at(site, probe, self.called, self._recording.graph, block.model)


_USED_INSIDE = """
    block call called current_step demand enter fake forget_shapes leave most_steps number read
    request result skip stop write
"""
_INTERNAL = frozenset(_USED_INSIDE.split())
"""What other parts of Insitu use of an invocation; not in `dir`."""


class Invoked(Invocation):
    """An invocation that the user has, by its name: it says what it has not.

    With a `__getattr__`, Python takes several times as long to find any attribute, also those that
    each site asks for. The invocation of a block with one prompt has no name, and does without.
    """

    __slots__ = ("_first",)

    def enter(self, frame: FrameType) -> None:
        """Opens the context.

        Args:
            frame: the frame whose `with` statement this is.
        """
        self._first = len(self._recording.graph.rows)
        super().enter(frame)

    def leave(self) -> None:
        """Closes it if it is open, and notes which lines stand in it."""
        if self._owner is not None:
            graph = self._recording.graph
            end = len(graph.rows)
            if end > self._first:
                graph.scopes = scopes = graph.scopes or []
                cast("list[Any]", scopes).append((self.number, self._first, end))
        super().leave()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        there = [own for own in dir(type(self)) if not own.startswith("_")]
        raise PathError(f"An invocation has no `{name}`{habit(name, OF_BLOCKS, there)}.", here())

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - _INTERNAL)


_open: ContextVar[tuple[Invocation, ...]] = ContextVar("insitu_open_invocations", default=())


def innermost(model: object, depth: int) -> tuple[Invocation | None, Mark]:
    """Returns the innermost open invocation of a model around the user's line, and that line.

    Args:
        model: the model.
        depth: how many frames between are ours at least.
    """
    frame = _getframe(depth)
    invocations = _open.get()
    if invocations:
        last = invocations[-1]
        owner = last._owner
        if last.model is model:
            if frame is owner:  # nearly always
                return last, (frame.f_code, frame.f_lasti)
            if frame.f_back is owner:  # a comprehension, or a function called from the block
                return last, mark(depth + 1)
    line = mark(depth + 1)
    outer: FrameType | None = frame
    while outer is not None:
        for invocation in reversed(invocations):
            if invocation._owner is outer and invocation.model is model:
                return invocation, line
        outer = outer.f_back
    # Entered by a function that has returned, such as the `__enter__` of a user's own class: only
    # what can be suspended may be neither running nor done.
    for invocation in reversed(invocations):
        owner = invocation._owner
        done = owner is not None and not owner.f_code.co_flags & _SUSPENDABLE
        if done and invocation.model is model and invocation._thread == get_ident():
            return invocation, line
    return None, line


def _entering_frame(frame: FrameType) -> FrameType:
    """The frame that a `with` statement in a generator acts for.

    That is the generator itself, unless `contextlib` drives it: such a function only wraps the
    block, and the code inside is that of whoever entered the context manager.
    """
    while (
        frame.f_code.co_flags & _GENERATOR
        and frame.f_back is not None
        and frame.f_back.f_code.co_filename == contextlib.__file__
    ):
        caller = frame.f_back
        while caller.f_back is not None and caller.f_code.co_filename == contextlib.__file__:
            caller = caller.f_back
        frame = caller
    return frame


_GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_SUSPENDABLE = _GENERATOR | inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE
