"""The errors that Insitu raises, and how they point at the user's line.

Every error is an `InsituError` and also the builtin that one would expect, so that both
`except InsituError` and `except AttributeError` do what they say. A message says what was found,
what to write instead, and ends with the file, the line and the source of the line to change.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from insitu.graph.location import Location


class InsituError(Exception):
    """Base of all errors of Insitu.

    Args:
        message: what was found and what to write instead.
        location: the user's line that it is about, if one is known.

    Attributes:
        results: of an error that `model.run(job)` raises, what there is all the same: `Results`.
    """

    results: Any = None

    def __init__(self, message: str, location: Location | None = None) -> None:
        super().__init__(message if location is None else f"{message}\n{location}")
        self.location = location


class PathError(InsituError, AttributeError):
    """A path that names no module, or an assignment to a handle."""


class IndexOutOfRangeError(InsituError, IndexError):
    """An index past the end of a module list."""


class BlockError(InsituError, RuntimeError):
    """Something was used in a place, or at a time, where no block gives it a meaning."""


class PromptError(InsituError, ValueError):
    """A prompt of a known form with a content that the model cannot process."""


class PromptTypeError(InsituError, TypeError):
    """A prompt of a form that is not supported."""


class OptionError(InsituError, ValueError):
    """An option that has no meaning where it was given.

    Attributes:
        option: the name of one that a block does not take; "" where something else is wrong.
    """

    option = ""


class OperationError(InsituError, TypeError):
    """An operation that cannot be recorded."""


class ShapeError(InsituError, ValueError, RuntimeError):
    """Values of shapes that do not go together, or a shape that cannot be known yet.

    It is a `RuntimeError` too, because that is what torch raises for the same mistake.
    """


class UnknownShapeError(ShapeError):
    """A shape that cannot be known before the run."""


class CausalityError(InsituError, RuntimeError):
    """A write whose value depends on something that comes after it in the run."""


class ExecutionError(InsituError, RuntimeError):
    """A recorded operation that failed while the model ran."""


class CancelledError(InsituError, RuntimeError):
    """A run that was ended from outside."""


class LimitError(InsituError, RuntimeError):
    """Something that takes more than a run may take.

    Attributes:
        limit: which limit: a field of `Limits`, or "values" for what bounds Python's own values in
            every run.
        found: how much it takes.
        allowed: how much it may take.
    """

    def __init__(
        self,
        message: str,
        location: Location | None = None,
        *,
        limit: str = "values",
        found: float = 0,
        allowed: float = 0,
    ) -> None:
        super().__init__(message, location)
        self.limit = limit
        self.found = found
        self.allowed = allowed


def at_line(
    error: InsituError, location: Location | None, message: str | None = None
) -> InsituError:
    """Returns an error with the line that it is about.

    Args:
        error: an error without one.
        location: the user's line.
        message: what it says instead, None for what it says.
    """
    made = type(error)(str(error) if message is None else message, location)
    vars(made).update({**vars(error), "location": location})
    return made


class NeverRanError(InsituError, RuntimeError):
    """A site at which nothing arrived: its module was not called in the run."""


class NoValueError(InsituError, ValueError):
    """A value that was asked for before the run, or that was not saved.

    It is no `AttributeError`, although `.value` raises it: Python would then ask the proxy for a
    recorded attribute of that name.
    """


class NotCachedError(InsituError, KeyError):
    """A value that an `ActivationCache`, or `Results` of a job, do not hold."""

    __str__ = Exception.__str__  # a `KeyError` shows its message in quotes


class WireError(InsituError, ValueError):
    """A job that cannot be sent to another process, or bytes that are none."""


class JobError(InsituError, ValueError):
    """A job that is for another model than the one that is to run it."""


class LoadError(InsituError, OSError):
    """A model or a file that cannot be found or read."""


class SaveError(InsituError, OSError):
    """A file that cannot be written."""


class MissingPackageError(InsituError, ImportError):
    """A package that a method or a picture takes, and that is not installed."""


class UnknownNameError(InsituError, ImportError):
    """A name that is imported from `insitu`, and that is called something else there."""


class RemoteError(InsituError, RuntimeError):
    """A server that cannot be reached, that refuses, or that has failed.

    A fault of the experiment itself raises the same error as without a server.

    Attributes:
        code: what it is, for programs: "busy", "quota", "never_fits", "not_found", "unauthorised",
            "engine_died", "protocol", "unreachable", "timeout" and others.
        status: the HTTP status that came with it, 0 if none did.
        retry_after: after how many seconds to try again; 0 if that would not help.
    """

    def __init__(
        self,
        message: str,
        location: Location | None = None,
        *,
        code: str = "remote",
        status: int = 0,
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message, location)
        self.code = code
        self.status = status
        self.retry_after = retry_after


def nearest(name: str, candidates: Iterable[str], most: int = 3) -> str:
    """Returns " (nearest: 'a', 'b')" for the candidates closest to a name, or "" if none is."""
    close = closest(name, candidates, most)
    return f" (nearest: {', '.join(map(repr, close))})" if close else ""


def closest(name: str, candidates: Iterable[str], most: int) -> list[str]:
    """Returns the candidates closest to a name.

    Close are a slip of the keys, and a name that shares a word with it. Others that merely have
    letters in common would mislead.
    """
    others = [other for other in dict.fromkeys(candidates) if other != name]  # that is refused
    close = difflib.get_close_matches(name, others, n=3 * most, cutoff=0.5)
    return [other for other in close if _resembles(name.lower(), other.lower())][:most]


def _resembles(name: str, other: str) -> bool:
    likeness = difflib.SequenceMatcher(None, name, other).ratio()
    if likeness >= (0.7 if name[:1] == other[:1] else 0.85) or sorted(name) == sorted(other):
        return True
    words, others = set(re.findall(r"[a-z]+", name)), set(re.findall(r"[a-z]+", other))
    shared = sum(len(word) for word in words & others if len(word) > 2)
    return 2 * shared >= sum(map(len, words)) > 0
