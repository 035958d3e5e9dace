"""What of the outside a run meets: listeners, a sink for saved values, and who may cancel it.

They hold for all runs of a `with` block, in its thread. Nothing is asked of them where there are
none: a run looks once whether there are.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from insitu.engine.events import Listener
    from insitu.engine.sinks import Sink


Told = tuple[str, int, int | None]
"""A saved value of a job: its name, its block and its step. The name is there once in a block."""


class Cancel:
    """Ends runs from outside, such as from another thread.

    A run that it is given to raises `CancelledError` between blocks, passes and steps, and leaves
    the model as it was.

    Example:
        >>> cancel = Cancel()
        >>> cancel.cancel()
        >>> cancel.is_cancelled
        True
    """

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Ends all runs that it was given to, those that come too. From any thread, at any time."""
        self.is_cancelled = True


class Seams(NamedTuple):
    """What runs meet.

    Attributes:
        listeners: who is told what happens.
        sink: what takes saved values; None if the run keeps them.
        cancels: what may end them.
        told: which saved values a job has told of so far; None outside of jobs.
    """

    listeners: tuple[Listener, ...] = ()
    sink: Sink | None = None
    cancels: tuple[Cancel, ...] = ()
    told: set[Told] | None = None


seams: ContextVar[Seams | None] = ContextVar("insitu_seams", default=None)
"""What runs of this context meet, None if there is nothing."""


@contextmanager
def around(
    sink: Sink | None = None, events: Listener | None = None, cancel: Cancel | None = None
) -> Generator[None]:
    """Lets runs in a `with` block meet something more of the outside.

    Args:
        sink: takes what they save, in the place of another.
        events: is told what happens in them, as others are.
        cancel: may end them, as others may.
    """
    now = seams.get() or Seams()
    listeners = now.listeners if events is None else (*now.listeners, events)
    cancels = now.cancels if cancel is None else (*now.cancels, cancel)
    met = Seams(listeners, now.sink if sink is None else sink, cancels, now.told)
    token = seams.set(None if met == Seams() else met)
    try:
        yield
    finally:
        seams.reset(token)


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Tells a function what happens in the runs in a `with` block.

    Args:
        listener: is given each event: see `insitu.engine.events`. It is called while the model is
            in use, so it runs no model. What it raises ends the run, which raises it.

    Example:
        >>> from insitu import LanguageModel, listening
        >>> model, told = LanguageModel("insitu/eiffel"), []
        >>> with listening(told.append):
        ...     with model.trace("The Eiffel Tower"):
        ...         logits = model.logits.save()
        >>> print(type(told[0]).__name__)
        PassStarted
    """
    return around(events=listener)


def saving_to(sink: Sink) -> AbstractContextManager[None]:
    """Gives a sink what runs in a `with` block save, each value the moment it is final.

    The runs keep none of it: `.value` of what `save` returned raises.

    Args:
        sink: takes the values.
    """
    return around(sink=sink)


def cancellable(cancel: Cancel) -> AbstractContextManager[None]:
    """Lets runs in a `with` block be ended from outside.

    Args:
        cancel: ends them.
    """
    return around(cancel=cancel)


def listened() -> bool:
    """Returns whether anybody listens to the runs of this context."""
    now = seams.get()
    return now is not None and bool(now.listeners)
