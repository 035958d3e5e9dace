"""Blocks: what `model.trace()` and `model.generate()` give.

A tracer collects invocations and one recording for all of them. When its `with` block ends
without an error the model runs, once, with the experiment inside; how that run is planned is in
`planning.py`, and how it is done in `running.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch

from insitu.graph.context import as_begun, default_dtype, enabled_casts, is_autocast_enabled
from insitu.graph.errors import BlockError, InsituError, NoValueError, PathError
from insitu.graph.habits import OF_BLOCKS, habit
from insitu.graph.location import Mark, here, mark, user_frame
from insitu.graph.node import EVERY, Graph, Site
from insitu.graph.ordinary import made_ordinary, make_constants_ordinary, ordinary_tensors
from insitu.graph.recording import Recording
from insitu.graph.replaying import replay
from insitu.graph.tracebacks import shortened
from insitu.runtime.plan import Plan
from insitu.runtime.procedure import Procedure, Subject
from insitu.runtime.summary import Planned, Summary
from insitu.tracing.block_messages import no_invoke, no_output, not_one_invocation, state_of_block
from insitu.tracing.in_thread import run_in_thread
from insitu.tracing.invocation import Invocation, Invoked
from insitu.tracing.raw_errors import raise_explained
from insitu.tracing.running import run_block
from insitu.tracing.scanning import scan_block
from insitu.tracing.scope import innermost
from insitu.tracing.session import Session, open_sessions, session_of
from insitu.tracing.steps import AtStep, Logits, StepPicker, Tokens, each_step, next_step

_USED_INSIDE = """
    arriving demand fake_module give_up is_open only_invocation procedure promises_output
    recording writer
"""
_INTERNAL = frozenset(_USED_INSIDE.split())
"""What other parts of Insitu use of a block; not in `dir`."""


class Tracer:
    """A block of recorded lines.

    Attributes:
        model: the model that will run.
        procedure: how it will run.
        promises_output: whether `output` is the result of the run and not a proxy.
        recording: what the lines of the block are recorded in.
        is_open: whether the `with` block is being executed.
    """

    _implicit: Invocation | None = None
    _request: Any = None
    _result: Any = None
    _ended = False
    _told: Sequence[Callable[[], Summary]] = ()  # there once it is planned
    _demanded: tuple[Mapping[str, Any], Mark] | None = None

    def __init__(
        self,
        model: Subject,
        procedure: Procedure[Any],
        prompt: tuple[tuple[Any, ...], dict[str, Any]] | None,
        promises_output: bool = False,
        dry: bool = False,
    ) -> None:
        self.model = model
        self.procedure = procedure
        self.promises_output = promises_output
        self.recording = Recording(self)
        self._invocations: list[Invocation] = []
        self._requests: list[Any] = []
        self._prompt = prompt
        self._dry = dry
        self._done = self.is_open = False
        self._session: Session | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        there = [own for own in dir(type(self)) if not own.startswith("_")]
        raise PathError(f"A block has no `{name}`{habit(name, OF_BLOCKS, there)}.", here())

    def __getitem__(self, key: object) -> NoReturn:
        raise BlockError(
            "A block is no output: write `with model.generate(prompt) as generator:`, and after it "
            "`generator.output`.",
            here(),
        )

    @property
    def graph(self) -> Graph:
        """The recorded graph."""
        return self.recording.graph

    def __repr__(self) -> str:
        return state_of_block(
            len(self.graph), len(self._told), self.is_open, self._done, self.promises_output
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - _INTERNAL)

    def __enter__(self) -> Tracer:
        if self.is_open or self._done:
            raise BlockError("This block was entered before: make a new one for a new run.", here())
        self.recording.begin()
        if self._prompt is not None:
            args, kwargs = self._prompt
            frame = user_frame(2)
            try:
                self._implicit = self._add(args, kwargs, (frame.f_code, frame.f_lasti))
            except InsituError as error:
                shortened(error)
                raise
            self._request = self._implicit.request
            self._implicit.enter(frame)
        if open_sessions.get():
            self._session = session = session_of(self.model)
            if session is not None:
                self.recording.session, self.recording.direct = session, False
                self.recording.order = session.begin()
        looks = self.model.looks
        looks.tree, looks.weights = None, False
        self.is_open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._leave(kind):
            self.run()
        elif error is not None:
            raise_explained(error)
            shortened(error)

    async def __aenter__(self) -> Tracer:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Runs the model in another thread, so that the event loop goes on: see `run_in_thread`."""
        if not self._leave(kind):
            if error is not None:
                raise_explained(error)
                shortened(error)
            return
        try:
            await run_in_thread(self.run, self.recording)
        except InsituError as failure:  # with the frames of the thread that it ran in
            shortened(failure)
            raise

    def _leave(self, kind: type[BaseException] | None) -> bool:
        """Ends the recording, and returns whether it is to be run now."""
        self._done = True
        self.is_open = False
        looks = self.model.looks
        looks.tree = looks.weights = False
        for invocation in self._invocations:
            invocation.leave()
        graph = self.recording.graph
        if graph.differentiates and (graph.contexts or torch.is_inference_mode_enabled()):
            make_constants_ordinary(graph)
        if kind is None and self._session is not None:
            self._session.add(self)
            return False
        self.recording.open = False
        if kind is not None:
            self.recording.fail(f"its block raised {kind.__name__}, so the model did not run.")
        return kind is None

    def run(self) -> None:
        """Runs what was recorded, and fills the saved values.

        The user's `torch.inference_mode()` is left for that: passes record autograd or not as they
        need it, and the saved values are ordinary tensors. Autocast and the default dtype are what
        they were where the block began, also for a block of a session and in another thread.
        """
        recording = self.recording
        casts, dtype = recording.casts, recording.dtype
        autocast = casts or is_autocast_enabled()
        if default_dtype() is not dtype or (autocast and enabled_casts() != casts):
            with as_begun(casts, dtype):
                self.run()
            return
        if torch.is_inference_mode_enabled():
            with ordinary_tensors():
                self.run()
            return
        told: list[Callable[[], Summary]] = []
        self._told = told
        block = (self.model, self.procedure, recording, self._invocations, self._requests)
        try:
            if self._dry:
                scan_block(*block, told)
            else:
                plan, results = run_block(*block, self._demanded, told)
                if self.promises_output:
                    self._take_outputs(plan, results)
        except BaseException as failure:
            recording.fail(f"its run raised {type(failure).__name__}.")
            shortened(failure)
            raise
        finally:
            recording.forget()
            # They refer to this: without them what nobody keeps is gone at once.
            self._invocations, self._requests, self._implicit = [], [], None

    @property
    def plan(self) -> Planned:
        """How the block ran: its passes, and what each of them left out.

        Raises:
            NoValueError: before the block has ended.
        """
        if not self._told:
            raise NoValueError("`tracer.plan` is made when the block ends.", here())
        return Planned([tell() for tell in self._told])

    def give_up(self, reason: str) -> None:
        """Says of every saved value why it will have none, if it has none yet."""
        self.recording.fail(reason)

    def invoke(self, *args: Any, **kwargs: Any) -> Invocation:
        """Adds a prompt, and gives the context in which sites mean its values.

        Args:
            args: the prompt, in any form that the model takes.
            kwargs: options for this prompt.

        Raises:
            PromptError: if the model cannot process the prompt.
            PromptTypeError: if it is no prompt.
            BlockError: outside of the block, or where the block was given a prompt itself.
        """
        if self._prompt is not None or not self.is_open:
            raise BlockError(no_invoke(self._prompt is not None), here())
        # The model runs later, and what is given here may be filled anew for the next prompt.
        given = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                kwargs[name] = value.clone()
        try:
            return self._add((*given,), kwargs, mark())
        except InsituError as error:
            shortened(error)
            raise

    @property
    def output(self) -> Any:
        """What the model returned.

        In a generation, what one `generate` of the model on all prompts returns: token ids
        `(rows, position)`, there once the model has run. In a trace of one prompt, a proxy.

        Raises:
            NoValueError: in a generation, before the model has run.
            BlockError: in a trace of several prompts, whose outputs are `invoker.output`.
        """
        if not self.promises_output:
            self._only_request()
            if self._implicit is None:
                raise BlockError(
                    "`tracer.output` is a value of the run: read and save it inside the block.",
                    here(),
                )
            return self._implicit.output
        if self._result is None:
            raise NoValueError(no_output(self.is_open, self._done, self._ended), here())
        return self._result

    @property
    def ids(self) -> Any:
        """The token ids of a block's one prompt, `(rows, position)`.

        Raises:
            PromptError: if it was given as embeddings.
        """
        return self._only_request().token_ids

    @property
    def mask(self) -> Any:
        """Which positions of `ids` hold tokens and which padding, `(rows, position)`."""
        return self._only_request().visible_mask

    @property
    def step(self) -> StepPicker:
        """`generator.step(2)` or `generator.step[2]`: a context whose lines mean step 2.

        It holds for the invocations that there are; `invoker.step` is of one of them.
        """
        return StepPicker(self._invocations, self.procedure.steps)

    @property
    def steps(self) -> Iterator[int]:
        """The numbers of all steps, for a loop in whose rounds lines mean that step."""
        return each_step(self._invocations, self.procedure.steps, mark())

    def every_step(self) -> AtStep:
        """Returns a context whose lines are recorded once and run in every step."""
        return AtStep(self._invocations, EVERY)

    def next(self) -> int:
        """Lets the lines that come now mean the step after the present one; returns its number."""
        return next_step(self._invocations, self.procedure.steps, mark())

    @property
    def tokens(self) -> Tokens:
        """The token ids that steps choose, in a block of one prompt: see `invoker.tokens`."""
        return self.only_invocation().tokens

    @property
    def logits(self) -> Logits:
        """The logits for the next token, in a block of one prompt: see `invoker.logits`."""
        return self.only_invocation().logits

    def _only_request(self) -> Any:
        if self._request is None:
            raise BlockError(
                "This block has its prompts in invocations: ask the `invoker` of "
                "`with tracer.invoke(prompt) as invoker:`.",
                here(3),
            )
        return self._request

    def only_invocation(self) -> Invocation:
        """Returns the invocation of a block that has one.

        Raises:
            BlockError: if it has several, or none so far.
        """
        entered = self._done or self.is_open
        if len(self._invocations) != 1 or not entered:
            raise BlockError(not_one_invocation(entered), here(3))
        return self._invocations[0]

    def _add(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Invocation:
        procedure = self.procedure
        request = procedure.request(args, kwargs, mark)
        if torch.is_inference_mode_enabled():
            request = made_ordinary(request)
        kind = Invoked if self._prompt is None else Invocation
        invocation = kind(self, len(self._invocations), request)
        self._invocations.append(invocation)
        self._requests.append(request)
        for graph in self.model.edits:
            step = 0 if procedure.steps == 1 else EVERY
            replay(self.recording, graph, invocation.number, step)
            if graph.unfused:
                self.demand(self.model.vocabulary.unfused())
        return invocation

    def demand(self, options: Mapping[str, Any]) -> None:
        """Lets the block run with options that it takes for a value to be there.

        Args:
            options: such as which implementation of attention.
        """
        if options:
            self._demanded = (options, mark())
        procedure = self.procedure.demanding(options) if options else self.procedure
        if procedure is not self.procedure:
            self.procedure = procedure
            for invocation in self._invocations:
                invocation.forget_shapes()

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        return self._invocations[site.invocation].fake(site)

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""
        return self.model.fake_module(path)

    def writer(self) -> int | None:
        """Returns in which invocation the running line stands, None if in none."""
        if len(self._invocations) == 1:
            return 0
        scope, _ = innermost(self.model, 1)
        return scope.number if isinstance(scope, Invocation) else None

    def _take_outputs(self, plan: Plan, results: Sequence[Any]) -> None:
        """Makes what the passes returned into what the block and its invocations give."""
        if plan.stops:
            self._ended = True
            return
        outputs = self.procedure.outputs(results, self._requests)
        if outputs is not None:
            self._result = outputs.whole
            for invocation, result in zip(self._invocations, outputs.each, strict=True):
                invocation.result = result
