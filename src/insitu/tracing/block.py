"""A block: its `with` statement, its recording, its invocations, and its run.

When it ends without an error the model runs, once, with the experiment inside. The user holds a
`Tracer` (`tracer.py`), whose attributes are slow, since it answers for names that it does not have.
So the work is done here. `planning.py` plans a run, and `running.py` does it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from sys import _getframe
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from insitu.batching.procedure import Procedure, Subject
from insitu.engine.failures import first_error
from insitu.graph import location
from insitu.graph.cells import Missing
from insitu.graph.context import (
    as_begun,
    default_dtype,
    enabled_casts,
    is_autocast_enabled,
    is_inference_mode_enabled,
)
from insitu.graph.errors import BlockError, InsituError
from insitu.graph.given import copied
from insitu.graph.location import Mark, here, mark, user_frame
from insitu.graph.node import EVERY, Site
from insitu.graph.ordinary import made_ordinary, make_constants_ordinary, ordinary_tensors
from insitu.graph.recording import Recording
from insitu.graph.renumbering import replay
from insitu.graph.saved_proxy import withdraw
from insitu.graph.tracebacks import shortened
from insitu.tracing.invocation import Invocation, Invoked, innermost
from insitu.tracing.raw_errors import raise_explained
from insitu.tracing.run import Run
from insitu.tracing.running import run_block
from insitu.tracing.scanning import scan_block
from insitu.tracing.session import Session, open_sessions, session_of
from insitu.tracing.watching import watcher

if TYPE_CHECKING:
    from insitu.engine.job import Job
    from insitu.engine.job_outcome import Outputs
    from insitu.tracing.away import Away


class Block:
    """A block of recorded lines, and their run.

    Args:
        model: the model that will run.
        procedure: how it will run.
        prompt: what the block gives to its one invocation; None if it has an `invoke` for each.
        promises_output: whether `output` is the result of the run and not a proxy.
        dry: whether the run is only planned.

    Attributes:
        recording: what its lines are recorded in.
        invocations: its invocations, until it has run.
        alone: the one of the block's own prompt, until it has run.
        request: what that one is called with.
        is_open: whether the `with` block is being executed.
        is_done: whether that has ended.
        ran: its run, None before it ends.
        is_dry: whether the run is only planned.
        raised: the name of the error that the block has raised, None if it has raised none.
        away: where it is run, None for where its model is.
        waits: whether it waits for its results, where it is run somewhere else.
        sent: what its results can be had from, if it did not wait.
        in_steps: how many contexts are open that say which step lines mean.
    """

    # What most blocks never use is of the class.
    request: Any = None
    raised: str | None = None
    away: Away | None = None
    waits = True
    sent: Any = None
    ran: Run | None = None
    in_steps = 0

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
        self.prompt = prompt
        self.promises_output = promises_output
        self.recording = Recording(self)
        self.invocations: list[Invocation] = []
        self.alone: Invocation | None = None
        self.is_open = self.is_done = False
        self.is_dry = dry
        self._looks = model.looks
        self._requests: list[Any] = []
        self._session: Session | None = None
        self._demanded: tuple[Mapping[str, Any], Mark] | None = None

    def enter(self, frame: FrameType) -> None:
        """Begins to record.

        Args:
            frame: the frame whose `with` statement the block is.

        Raises:
            BlockError: if it was entered before.
            InsituError: if something is wrong with its prompt.
        """
        if self.is_open or self.is_done:
            raise BlockError("This block was entered before: make a new one for a new run.", here())
        recording, model = self.recording, self.model
        recording.begin()
        session = session_of(model) if open_sessions.get() else None
        if self.prompt is not None:
            line = (frame.f_code, frame.f_lasti)
            try:
                # Between blocks of a session also a large prompt may be filled anew.
                given = copied(*self.prompt) if session else recording.given(*self.prompt, line)
                self.alone = invocation = self.add(*given, line)
            except InsituError as error:
                shortened(error)
                raise
            self.request = invocation.request
            invocation.enter(frame)
        if session is not None:
            self._session = session
            session.begin(recording)
        self._looks.tree, self._looks.weights = None, False
        self.is_open = True

    def leave(self, kind: type[BaseException] | None) -> bool:
        """Ends the recording, and returns whether it is to be run now.

        Args:
            kind: of what the block raised.
        """
        self.is_done = True
        self.is_open = False
        looks = self._looks
        looks.tree = looks.weights = False
        for invocation in self.invocations:
            invocation.leave()
        recording, graph = self.recording, self.recording.graph
        if graph.differentiates and (graph.contexts or is_inference_mode_enabled()):
            make_constants_ordinary(graph)
        if self._session is not None:
            self._session.end(self if kind is None else None)
            if kind is None:
                return False
        recording.open = False
        if kind is not None:
            self.raised = kind.__name__
            recording.fail(f"its block raised {self.raised}, so the model did not run.")
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
        if is_inference_mode_enabled():
            with ordinary_tensors():
                self.run()
            return
        run = Run(self.model, self.procedure, recording, self._requests, self._demanded)
        self.ran = run
        failed: Exception | None = None
        watching = watcher.get()
        if watching is not None:
            watching.begins(self)
        away = self.away or self.model.away
        try:
            if recording.held and self._session is None:  # a session has looked at all
                recording.check_held()
            if self.is_dry:
                scan_block(run)
            elif away is not None and not self.waits:
                from insitu.tracing.away import check_sent  # of use only with a server

                job = self.job
                check_sent(self.model, job)
                self.sent = away.send(job)
                recording.fail(
                    "its job was sent without waiting for it: `tracer.remote_job.result()` has it."
                )
            elif away is not None:
                from insitu.tracing.away import run_away  # of use only with a server

                (run.outputs,), failed = run_away(self.model, [self], away)
                self._spread(run)
            else:
                run_block(run)
                if run.outputs is not None:
                    self._spread(run)
                if run.failed:
                    failed = first_error([one.error for one in run.failed])
                    run.failed = ()  # they would keep each other
        except BaseException as failure:
            recording.fail(f"its run raised {type(failure).__name__}.")
            if watching is not None:
                watching.ended(self, failure)
            shortened(failure)
            raise
        finally:
            recording.forget()
            # They refer to this: without them what nobody keeps is gone at once.
            self.invocations, self.alone = [], None
        if watching is not None:
            watching.ended(self, failed)
        if failed is not None:  # of some invocations: the values of the others are there
            try:
                raise shortened(failed)
            finally:
                del failed  # else the error and this frame would keep each other

    def came(self, outputs: Outputs | None) -> None:
        """Takes what the block's run somewhere else returned, beside its saved values.

        Args:
            outputs: what its generation returned, None for a trace.
        """
        self.ran = run = self.recorded()
        run.outputs = outputs
        self._spread(run)
        self.recording.forget()
        self.invocations, self.alone = [], None

    def _spread(self, run: Run) -> None:
        """Gives each invocation what its generation returned, and notes if a line ended the run."""
        run.is_stopped = bool(self.recording.graph.stops)
        if run.outputs is not None:
            for invocation, own in zip(self.invocations, run.outputs.each, strict=True):
                invocation.result = own

    @property
    def job(self) -> Job:
        """The block as data: see `Tracer.job`."""
        from insitu.tracing.jobs import job_of

        return job_of(self.model, [self])

    def recorded(self) -> Run:
        """Returns what a job is made of.

        Raises:
            BlockError: while the block is open, or if it has raised.
        """
        if not self.is_done:
            raise BlockError("A block is a job once it has ended: ask for it after that.", here(3))
        if self.raised is not None:
            raise BlockError(
                f"The block raised {self.raised}, so it is not whole, and no job.", here(3)
            )
        return Run(self.model, self.procedure, self.recording, self._requests, self._demanded)

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any], mark: Mark) -> Invocation:
        """Adds an invocation.

        Args:
            args: what it is given by place, with tensors that stay as they are now.
            kwargs: what it is given by keyword, of the same kind.
            mark: the user's line.

        Raises:
            InsituError: if something is wrong with the prompt.
        """
        request = self.procedure.request(args, kwargs, mark)
        if is_inference_mode_enabled():
            request = made_ordinary(request)
        kind = Invoked if self.prompt is None else Invocation
        invocation = kind(self, len(self.invocations), request)
        self.invocations.append(invocation)
        self._requests.append(request)
        for graph in self.model.edits:
            step = 0 if self.procedure.steps_of(request) == 1 else EVERY
            replay(self.recording, graph, invocation.number, step)
            if graph.unfused:
                self.demand(invocation, self.model.vocabulary.unfused())
        return invocation

    def demand(self, invocation: Invocation, options: Mapping[str, Any]) -> None:
        """Lets an invocation run with options that it takes for a value to be there.

        Args:
            invocation: the invocation.
            options: such as which implementation of attention.
        """
        if options:
            self._demanded = (options, mark())
            request = self.procedure.demanding(invocation.request, options)
            if request is not invocation.request:
                self._requests[invocation.number] = invocation.request = request
                invocation.forget_shapes()

    def demand_alike(self) -> None:
        """Lets all invocations run with the options that values of any of them take.

        Methods whose results are differences between invocations ask for it: then these differ in
        nothing else, and share what they have in common.
        """
        if self._demanded is not None:
            options, _ = self._demanded
            for invocation in self.invocations:
                self.demand(invocation, options)

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        return self.invocations[site.invocation].fake(site)

    def writer(self) -> int | None:
        """Returns in which invocation the running line stands, None if in none."""
        if len(self.invocations) == 1:
            return 0
        invocation, _ = innermost(self.model, 1)
        return None if invocation is None else invocation.number


class BlockContext:
    """The `with` statement of a block: it begins the recording, and runs what was recorded.

    Attributes:
        block: the block behind it.
    """

    def __init__(self, block: Block) -> None:
        self.block = block

    def __enter__(self) -> Self:
        frame = _getframe(1)
        self.block.enter(frame if frame.f_code is location.users_code else user_frame(2))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = self.block
        if block.leave(kind):
            block.run()
        elif error is not None:
            raise_explained(error)
            shortened(error)

    async def __aenter__(self) -> Self:
        self.block.enter(user_frame(2))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Runs the model in another thread, so that the event loop goes on.

        A run that has begun is not broken off: if the task is cancelled, that takes effect when
        the model has run, and nothing is saved.
        """
        block = self.block
        if not block.leave(kind):
            if error is not None:
                raise_explained(error)
                shortened(error)
            return
        running = asyncio.ensure_future(asyncio.to_thread(block.run))
        try:
            await asyncio.shield(running)
        except InsituError as failure:  # with the frames of the thread that it ran in
            shortened(failure)
            raise
        except asyncio.CancelledError:
            recording, saves = block.recording, dict(block.recording.saves)
            with contextlib.suppress(BaseException):
                await running
            for index, holder in saves.items():
                withdraw(holder, recording, index, Missing("its task was cancelled."))
            raise
