"""How far long work has come: a bar on a terminal or in a notebook, with the time that is left.

A bar listens to the events of runs; so a method that is one trace of many passes has a bar without
doing anything for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from insitu.engine.events import Event, PassEnded, PassStarted
from insitu.engine.seams import Seams, seams

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Item = TypeVar("Item")

VARIABLE = "INSITU_PROGRESS"
"""The environment variable that decides where the caller does not: "0" for no bars."""


class Bar:
    """A bar that shows how far some work has come.

    Args:
        progress: where it is shown; None if it is not.
        title: the name of the work.
    """

    def __init__(self, progress: Progress | None, title: str) -> None:
        self._progress = progress
        self._before, self._share = 0.0, 1.0
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(title, total=None, note="")

    def each(self, items: Iterable[Item], total: int | None = None) -> Iterator[Item]:
        """Yields things that are worked on one after the other, and shows how many are done.

        A run within the work on one of them moves the bar by its part of that one.

        Args:
            items: the things.
            total: how many there are, if they cannot tell.
        """
        if total is None and isinstance(items, Sized):
            total = len(items)
        before, share = self._before, self._share
        try:
            for done, item in enumerate(items):
                if total:
                    self._before, self._share = before + share * done / total, share / total
                    self._show(self._before)
                yield item
            self._show(before + share)
        finally:
            self._before, self._share = before, share

    def reached(self, done: float, total: float) -> None:
        """Shows how far it has come.

        Args:
            done: how much is done.
            total: how much there is in all.
        """
        if total > 0:
            self._show(self._before + self._share * min(done / total, 1.0))

    def hears(self, event: Event) -> None:
        """Shows how far a run has come: a listener of its events.

        Args:
            event: an event of the run.
        """
        if isinstance(event, PassStarted | PassEnded):
            self.reached(event.done, 1.0)

    def say(self, note: str) -> None:
        """Shows a few words beside the bar, such as the present loss.

        Args:
            note: the words.
        """
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=note)

    def _show(self, share: float) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=share, total=1.0)

    def _end(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)


_open: ContextVar[Progress | None] = ContextVar("open", default=None)


@contextmanager
def progress(title: str, shown: bool | None = None) -> Generator[Bar, None, None]:
    """Shows how far the work in its block has come.

    Runs of a model in the block move the bar with each pass that is done, weighed by the work
    that it is; loops do with `bar.each`. A block within another has its bar below that one's.
    The bar is gone when the block ends, however it ends.

    Args:
        title: the name of the work, such as "Patching".
        shown: whether it is shown; None for on a terminal or in a notebook, unless the
            environment variable INSITU_PROGRESS is "0".

    Example:
        >>> with progress("Training", shown=False) as bar:
        ...     total = sum(bar.each(range(4)))
        >>> total
        6
    """
    outer = _open.get()
    made = None if outer is not None else _made(shown)
    visible = outer if shown is not False and made is None else made
    bar = Bar(visible, title)
    told = seams.set(seams.get() if visible is None else _heard_by(bar))
    opened = _open.set(visible)
    try:
        if made is not None:
            made.start()
        yield bar
    finally:
        _open.reset(opened)
        seams.reset(told)
        bar._end()
        if made is not None:
            made.stop()


def _made(shown: bool | None) -> Any:
    """What shows bars, None if they are not to be shown."""
    if shown is False or (shown is None and os.environ.get(VARIABLE) == "0"):
        return None
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    console = Console(stderr=True)
    if shown is None and not (console.is_terminal or console.is_jupyter):
        return None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        Left(),
    )
    note = TextColumn("{task.fields[note]}", style="dim", markup=False)
    return Progress(*columns, note, console=console, transient=True)


def _heard_by(bar: Bar) -> Seams:
    """What runs meet with a bar that listens, in the place of one around it."""
    now = seams.get() or Seams()
    others = [one for one in now.listeners if not isinstance(getattr(one, "__self__", None), Bar)]
    return now._replace(listeners=(*others, bar.hears))
