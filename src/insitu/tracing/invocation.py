"""Invocations: one prompt, and what is read while the model processes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, cast

from insitu.engine.functions import Called
from insitu.engine.probe import Call, Probe
from insitu.graph.errors import BlockError, NoValueError, PathError
from insitu.graph.habits import OF_BLOCKS, habit
from insitu.graph.intervention import skip, write
from insitu.graph.location import Mark, here, mark, user_frame
from insitu.graph.node import EVERY, NO_KWARGS, Address, Kind, Ref, Site, ref
from insitu.graph.operations import READ
from insitu.graph.proxy import Proxy, StructureProxy
from insitu.tracing.around import Around
from insitu.tracing.scope import Scope
from insitu.tracing.site_shapes import arriving_at, called_in
from insitu.tracing.steps import AtStep, Logits, StepPicker, Tokens, each_step, next_step

_USED_INSIDE = """
    block call called current_step demand enter fake forget_shapes leave most_steps number read
    request result skip stop write
"""
_INTERNAL = frozenset(_USED_INSIDE.split())
"""What other parts of Insitu use of an invocation; not in `dir`."""


class Invocation(Scope):
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
        *("_probe", "_reads", "_recording", "_views"),
        *("block", "current_step", "number", "request", "result"),
    )

    def __init__(self, block: Around, number: int, request: Any, model: object = None) -> None:
        self._owner = None
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

    def read(
        self, path: str, kind: Kind, mark: Mark, call: int = 0, step: int | None = None
    ) -> Proxy:
        """Returns a proxy for the value of a module in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            mark: the user's line.
            call: in which call of the module.
            step: in which step, if not the one that lines mean now.
        """
        recording = self._recording
        address = (self.number, path, kind, call, self.current_step if step is None else step)
        source = self._reads.get(address)
        if source is None:
            graph = recording.graph
            if graph.writes:
                source = recording.first_read(address, mark)
            else:  # what that does, without the call: most sites are read once
                rows = graph.rows
                source = self._reads[address] = ref(len(rows))
                rows.append((READ, address, NO_KWARGS, (), False, mark))
        if kind == "output" and path in self._views:
            return StructureProxy(recording, source)
        return Proxy(recording, source)

    def write(
        self,
        path: str,
        kind: Kind,
        value: Any,
        mark: Mark,
        call: int = 0,
        step: int | None = None,
    ) -> None:
        """Puts a value in the place of a module's own, in the processing of this prompt.

        Args:
            path: the module's path.
            kind: which of its values.
            value: recorded values, constants, or containers of both.
            mark: the user's line.
            call: in which call of the module.
            step: in which step, if not the one that lines mean now.
        """
        address = (self.number, path, kind, call, self.current_step if step is None else step)
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
        """Forgets what is known of the run's shapes, since it will run otherwise."""
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

        What is saved in it becomes a list with one value a step, of the steps in which there was
        one.
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
            if not self.block.is_open:
                raise BlockError(
                    "`invoker.output` is a value of the run: read and save it inside the block.",
                    here(),
                )
            return self.read("", "output", mark())
        if self.result is None and not self._recording.open:
            raise NoValueError(
                "`invoker.output` has no value: its run failed, or `stop` ended it.", here()
            )
        if self.result is None:
            raise NoValueError(
                "`invoker.output` has no value yet: the model runs when the outermost `with` block "
                "ends.",
                here(),
            )
        return self.result

    @property
    def ids(self) -> Any:
        """The token ids that the prompt became, `(rows, position)`.

        Raises:
            PromptError: if it was given as embeddings.
        """
        return self.request.token_ids

    @property
    def mask(self) -> Any:
        """Which positions of `ids` hold tokens (1) and which padding (0), `(rows, position)`.

        There is padding only where several prompts of different length were given as one: before
        them where the model looks back only, so that the last position is a token in every row,
        else behind them.
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


class Invoked(Invocation):
    """An invocation that the user has, by its name: it says what it has not.

    With a `__getattr__`, Python takes several times as long to find any attribute, also those that
    each site asks for. The invocation of a block with one prompt has no name, and does without.
    """

    __slots__ = ("_first",)

    def enter(self, frame: FrameType) -> None:
        """Opens the scope.

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
