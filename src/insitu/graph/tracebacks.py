"""Short tracebacks: of an error of Insitu's, the frames of the user's own files.

The frames of Insitu, torch and Transformers between the user's line and the place that noticed
the mistake say nothing of it. They are taken out where an error leaves Insitu, from the error and
from what it was raised from. `INSITU_TRACEBACK=full` leaves all of them in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import ParamSpec, TypeVar

from insitu.graph.errors import InsituError
from insitu.graph.location import is_library

P = ParamSpec("P")
R = TypeVar("R")


def shortened(error: BaseException) -> BaseException:
    """Takes the frames of libraries out of the traceback of an error, if it is one of Insitu's.

    What it was raised from stays reachable as `__cause__`, with the user's own frames.

    Args:
        error: the error. It is changed.

    Returns:
        The error.
    """
    if not isinstance(error, InsituError) or os.environ.get("INSITU_TRACEBACK") == "full":
        return error
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        # A traceback begins where the exception was caught: what the user's own code caught, and
        # was handling when the error was raised, is the user's to see.
        traceback = current.__traceback__
        if current is error or (traceback is not None and _is_of_library(traceback)):
            current.__traceback__ = _own(traceback)
        pending += (current.__cause__, current.__context__)
    return error


def _is_of_library(traceback: TracebackType) -> bool:
    return is_library(traceback.tb_frame.f_code.co_filename)


def _own(traceback: TracebackType | None) -> TracebackType | None:
    """The entries of a traceback that are in files of the user's."""
    entries: list[TracebackType] = []
    while traceback is not None:
        if not _is_of_library(traceback):
            entries.append(traceback)
        traceback = traceback.tb_next
    kept: TracebackType | None = None
    for entry in reversed(entries):
        kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return kept


def short_tracebacks(function: Callable[P, R]) -> Callable[P, R]:
    """Lets errors of Insitu's leave a public function with a short traceback.

    Args:
        function: the function.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InsituError as error:
            failed = error
        try:
            raise shortened(failed)
        finally:
            del failed  # else the error and this frame would keep each other

    return call
