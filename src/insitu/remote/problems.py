"""Errors as data: what a server answers in place of a result (RFC 9457), and back to an error.

An error of Insitu keeps its class, its message and the line that it is about, so that a client
raises what the run would have raised there. `error_of` gives the client's own line where the
error is about a line that the client has recorded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import CodeType

import msgspec

from insitu.graph import errors
from insitu.graph.errors import InsituError, LimitError, LoadError, RemoteError, SaveError, at_line
from insitu.graph.location import Location, SourceLine, is_library
from insitu.graph.wire_message import MOST_TEXT, file_name, printable


class Line(msgspec.Struct, frozen=True):
    """A line of the user's.

    Attributes:
        file: the last part of the name of its file.
        line: its number, from 1.
        text: the source of it, or "".
    """

    file: str
    line: int
    text: str = ""


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, rename={"kind": "type"}):
    """A fault of a request or of a job, as RFC 9457 describes it.

    Attributes:
        code: its name for machines. An error of Insitu has the name of its class without `Error`,
            in small letters with underscores: "shape", "path", "limit". A server has others too,
            such as "not_found", "too_large", "engine_died".
        title: the same in a few words.
        status: the HTTP status.
        detail: what was found, and what to write or do instead; without the line.
        kind: a name for the code, as the RFC wants one.
        line: the user's line that it is about, None if it is about none.
        limit: of a limit that was passed, its name.
        found: how much was asked for.
        allowed: how much is allowed.
        digests: of "missing_blobs", the tensors that the server does not have.
        retry_after: after how many seconds to try again; 0 if that would not help.
    """

    code: str
    title: str
    status: int
    detail: str
    kind: str = "about:blank"
    line: Line | None = None
    limit: str | None = None
    found: float = 0.0
    allowed: float = 0.0
    digests: tuple[str, ...] = ()
    retry_after: float = 0.0


class ProblemError(Exception):
    """A problem that is raised where a server finds it.

    Args:
        problem: the problem.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


LineOf = Callable[[Line], Location | None]
"""Finds where the client has written a line, None if nowhere."""


def _code(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Error")).lower()


_CLASSES: dict[str, type[InsituError]] = {
    _code(name): kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, InsituError)
}
"""The classes of errors, by their codes."""

_CODES = {kind: code for code, kind in _CLASSES.items()}
_ABOUT_FILES = (LoadError, SaveError)
_PATH = re.compile(r"(?<![\w:/.~-])(?:~|[A-Za-z]:)?(?:[/\\][\w.+@-](?:[\w.+@ -]*[\w+@-])?)+[/\\]?")
_PLACE = re.compile(r'^  File "([^"\n]*)", line (\d{1,9})(?:\n    (.*))?$', re.MULTILINE)
_MOST = sys.float_info.max
_MOST_DETAIL = 20_000
_MOST_LINE = 2**31


def code_of(kind: type[BaseException]) -> str:
    """Returns the code of a class of errors.

    Args:
        kind: the class. One that `graph/errors.py` does not have has the code of its base.

    Returns:
        The code; "internal" for a class that is not of Insitu.
    """
    return next((_CODES[base] for base in kind.__mro__ if base in _CODES), "internal")


def class_of(code: str) -> type[InsituError]:
    """Returns the class of errors that has a code.

    Args:
        code: the code.

    Returns:
        The class; `RemoteError` for a code that only servers have.
    """
    return _CLASSES.get(code, RemoteError)


def problem_of(error: BaseException, status: int = 422) -> Problem:
    """Returns an error as a problem.

    An error that is not of Insitu is a fault of the server's, and its text stays there: it may name
    files.

    Args:
        error: the error.
        status: the HTTP status for a fault of a job.
    """
    if isinstance(error, ProblemError):
        return error.problem
    if not isinstance(error, InsituError):
        detail = f"The server has failed with {type(error).__name__}. Its log says more."
        return Problem("internal", "Internal error", 500, detail)
    code, retry_after = code_of(type(error)), 0.0
    if isinstance(error, RemoteError):
        code, retry_after, status = error.code, error.retry_after, error.status or status
    detail = message_of(error).encode(errors="replace").decode()  # no JSON has lone surrogates
    if isinstance(error, _ABOUT_FILES):
        detail = _PATH.sub(lambda path: file_name(path[0].rstrip("/\\")), detail)
    problem = Problem(
        code, _title(code), status, detail, line=_line(error.location), retry_after=retry_after
    )
    if not isinstance(error, LimitError):
        return problem
    return msgspec.structs.replace(
        problem, limit=error.limit, found=_finite(error.found), allowed=_finite(error.allowed)
    )


def error_of(problem: Problem, line_of: LineOf) -> InsituError:
    """Returns the error that a problem was made of: of the same class, with the same message.

    Args:
        problem: the problem, which may come from anybody.
        line_of: finds the client's own line.
    """
    line = problem.line
    location = None
    if line is not None:
        location = line_of(line) or Location(SourceLine(*_shown(line)), 0)
    detail = "\n".join(map(printable, problem.detail[:_MOST_DETAIL].split("\n")))
    detail = _with_own_lines(detail, line_of)
    kind = class_of(problem.code)
    if kind is RemoteError:
        return RemoteError(
            detail,
            location,
            code=printable(problem.code[:100]),
            status=problem.status,
            retry_after=problem.retry_after,
        )
    if kind is LimitError:
        limit, found, allowed = problem.limit or "values", problem.found, problem.allowed
        return LimitError(detail, location, limit=limit, found=found, allowed=allowed)
    return kind(detail, location)


def relocated(error: InsituError, line_of: LineOf) -> InsituError:
    """Returns an error of results with the client's own line, if it is about one.

    Args:
        error: the error.
        line_of: finds the client's own line.
    """
    line = _line(error.location)
    own = None if line is None else line_of(line)
    if own is None:
        return error
    return at_line(error, own, _with_own_lines(message_of(error), line_of))


def _with_own_lines(message: str, line_of: LineOf) -> str:
    """A message with the client's own lines where it names others than that of the error."""

    def own(found: re.Match[str]) -> str:
        place = line_of(Line(found[1], int(found[2]), found[3] or ""))
        return found[0] if place is None else str(place)

    return _PLACE.sub(own, message)


def message_of(error: InsituError) -> str:
    """Returns what an error says, without the line.

    Args:
        error: the error.
    """
    said = str(error)
    return said if error.location is None else said.removesuffix(f"\n{error.location}")


def _finite(number: float) -> float:
    """A number as JSON has it: neither infinite nor too large for a float."""
    return float(min(max(number, -_MOST), _MOST)) if number == number else 0.0


def _title(code: str) -> str:
    return code.replace("_", " ").capitalize()


def _line(location: Location | None) -> Line | None:
    """A line as it travels: without the folders of its file, which tell who the user is.

    A line of a library that runs here is no line of the user's: an error of a job says in whose
    process it was found, and a client gives its own line.
    """
    if location is None or (isinstance(location.code, CodeType) and is_library(location.file)):
        return None
    return Line(file_name(location.file), location.line, printable(location.text)[:MOST_TEXT])


def _shown(line: Line) -> tuple[str, int, str]:
    """A line that anybody may have sent, as it is shown."""
    number = min(max(line.line, 0), _MOST_LINE)
    return file_name(line.file[:1000]), number, printable(line.text[:1000])
