"""Sessions: several blocks that run one after the other, at the end, and share their values."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any

from insitu.graph.cells import WAITING
from insitu.graph.errors import BlockError, OperationError, PathError
from insitu.graph.location import here
from insitu.graph.recording import Recording
from insitu.graph.tracebacks import shortened
from insitu.habits import OF_SESSIONS, habit
from insitu.tracing.raw_errors import raise_explained
from insitu.tracing.watching import watcher

if TYPE_CHECKING:
    from insitu.batching.procedure import Subject
    from insitu.engine.job import Job
    from insitu.tracing.away import Away
    from insitu.tracing.run import RecordedBlock


class Session:
    """What `model.session()` gives: a context in which blocks are recorded and none runs yet.

    When it ends, they run in the order in which they ended. A value of one can be used in those
    after it as if it were there already; only values that are to outlive the session are saved.

    Attributes:
        model: whose blocks it holds.
        away: where they are run, None for where the model is.
        blocks: its blocks, in their order, once it has ended; None before that, or if it raised.
        recording: that of its block that is open now, None between blocks.
    """

    def __init__(self, model: Subject, away: Away | None = None) -> None:
        self.model, self.away = model, away
        self._blocks: list[RecordedBlock] = []
        self.blocks: Sequence[RecordedBlock] | None = None
        self.recording: Recording | None = None
        self._done = False

    if not TYPE_CHECKING:  # to checkers, what is not declared is not there

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            there = [own for own in dir(type(self)) if not own.startswith("_")]
            raise PathError(f"A session has no `{name}`{habit(name, OF_SESSIONS, there)}.", here())

    def __enter__(self) -> Session:
        if self._done or self in open_sessions.get():
            raise BlockError("This session was entered before: make a new one.", here())
        open_sessions.set((*open_sessions.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done = True
        # Not the last one: sessions of several models may end in any order.
        open_sessions.set(tuple(session for session in open_sessions.get() if session is not self))
        for block in self._blocks:
            block.recording.open = False
        waiting, self._blocks = self._blocks, []
        self.blocks = None if kind is not None else [*waiting]
        if kind is not None:
            for block in waiting:
                block.recording.fail(
                    f"its session raised {kind.__name__}, so the model did not run."
                )
            if error is not None:
                raise_explained(error)
                shortened(error)
            return
        watching = watcher.get()
        if watching is not None:
            watching.begins(self)
        failure: BaseException | None = None
        try:
            _check_own_tensors(waiting)
            away = self.away or self.model.away
            if away is None:
                _run_all(waiting)
            else:
                _run_all_away(self.model, waiting, away)
        # Also Ctrl-C: whoever watches is told how the session ended.
        except BaseException as raised:
            failure = raised
            raise
        finally:
            for block in self.blocks or ():  # a session that is kept keeps no values
                for cell in block.recording.lent.values():
                    cell.content = WAITING
            if watching is not None:
                watching.ended(self, failure)

    @property
    def job(self) -> Job:
        """The blocks of the session as data: all that another process needs to run them.

        There once the session has ended. Tensors are taken as they are now.

        Raises:
            BlockError: before the session has ended, or if it has raised.
        """
        from insitu.tracing.jobs import job_of

        if self.blocks is None:
            state = "raised, so it is not whole, and no job" if self._done else "has not ended"
            raise BlockError(f"The session {state}: its job is there once it has ended.", here())
        if not self.blocks:
            raise BlockError("The session has no blocks, so there is no job.", here())
        return job_of(self.model, self.blocks)

    def begin(self, recording: Recording) -> None:
        """Takes the recording of a block that begins now, with its place among the others."""
        recording.session, recording.order = self, 1 + len(self._blocks)
        recording.direct = False
        self.recording = recording

    def end(self, block: RecordedBlock | None) -> None:
        """Takes that a block has ended: the block that has been recorded, None if it raised."""
        self.recording = None
        if block is not None:
            self._blocks.append(block)


def _check_own_tensors(waiting: list[RecordedBlock]) -> None:
    """Raises if tensors of the user's have changed since. Later, runs may have written there."""
    try:
        for block in waiting:
            block.recording.check_held()
    except OperationError as error:
        for block in waiting:
            block.recording.fail("its session raised OperationError, so the model did not run.")
        raise shortened(error) from None


def _run_all(waiting: list[RecordedBlock]) -> None:
    """Runs blocks one after the other. Those after one that fails have no values."""
    while waiting:
        try:
            waiting.pop(0).run()
        except BaseException as failure:
            for block in waiting:
                block.recording.fail(
                    f"an earlier block of its session raised {type(failure).__name__}."
                )
            raise


def _run_all_away(model: Subject, waiting: list[RecordedBlock], away: Away) -> None:
    """Runs blocks somewhere else, as one job; those that run nothing are looked at here."""
    from insitu.tracing.away import run_away  # of use only with a server

    # A scan asks for shapes alone, which are known without the server.
    _run_all([block for block in waiting if block.is_dry])
    waiting = [block for block in waiting if not block.is_dry]
    if not waiting:
        return
    try:
        came = run_away(model, waiting, away)
    except BaseException as failure:
        for block in waiting:
            block.recording.fail(f"its run raised {type(failure).__name__}.")
        shortened(failure)
        raise
    for block, outputs in zip(waiting, came.outputs, strict=True):
        block.came(outputs)
    if came.failed is not None:
        raise shortened(came.failed)


def session_of(model: object) -> Session | None:
    """Returns the innermost open session of a model in this context."""
    for session in reversed(open_sessions.get()):
        if session.model is model:
            return session
    return None


open_sessions: ContextVar[tuple[Session, ...]] = ContextVar("insitu_open_sessions", default=())
