"""Where in the user's source something was written.

Taken for every recorded operation, so it must cost next to nothing. A location is a code object and
the offset of an instruction. The line number and the text are looked up when they are shown.
"""

from __future__ import annotations

import contextlib
import linecache
import site
import sys
import sysconfig
from bisect import bisect_right
from contextvars import Context, ContextVar, copy_context
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from sys import _getframe  # pyright: ignore[reportPrivateUsage]
from types import CodeType, FrameType
from typing import NamedTuple


class SourceLine(NamedTuple):
    """A line that was written in another process, whose code objects are not here.

    Attributes:
        file: the last part of the source file's name.
        line: the line number, from 1.
        text: the source of the line, or "".
    """

    file: str
    line: int
    text: str


Mark = tuple[CodeType | SourceLine, int]
"""The content of a `Location`; a bare tuple takes a tenth of the time to make."""


class Location(NamedTuple):
    """A place in a source file.

    Attributes:
        code: the code object that was running, or the line itself if it was in another process.
        instruction: the offset of its current instruction, in bytes (`frame.f_lasti`).
    """

    code: CodeType | SourceLine
    instruction: int

    @property
    def file(self) -> str:
        """The source file's name, as Python knows it."""
        return self.code.file if isinstance(self.code, SourceLine) else self.code.co_filename

    @property
    def line(self) -> int:
        """The line number, from 1."""
        if isinstance(self.code, SourceLine):
            return self.code.line
        starts, lines = _lines_of(self.code)
        at = bisect_right(starts, self.instruction) - 1
        return lines[at] if at >= 0 else self.code.co_firstlineno

    @property
    def text(self) -> str:
        """The source of the line, or "" where it cannot be had."""
        if isinstance(self.code, SourceLine):
            return self.code.text
        text = linecache.getline(self.file, self.line)
        if len(text) > _LONGEST:  # the expression of it that was running
            positions = islice(self.code.co_positions(), self.instruction // 2, None)
            start, end, first, last = next(positions, (None,) * 4)
            if start == end and first is not None and last is not None:
                return text.encode()[first:last].decode(errors="replace").strip()
        return text.strip()

    def __str__(self) -> str:
        place = f'  File "{self.file}", line {self.line}'
        return f"{place}\n    {self.text}" if self.text else place


_MOST_TABLES = 256
_tables: dict[int, tuple[CodeType, list[int], list[int]]] = {}
"""The lines of code objects, by identity: to hash one goes through all of its instructions."""


def _lines_of(code: CodeType) -> tuple[list[int], list[int]]:
    """Where each run of instructions of one line begins, and which line that is.

    To go through those of a script of 300 lines takes 0.3 ms, and a job names all of its lines.
    """
    found = _tables.get(id(code))
    # It is kept with its table, so that no other has its identity meanwhile.
    if found is None or found[0] is not code:
        runs = [(start, line or code.co_firstlineno) for start, _, line in code.co_lines()]
        found = code, [start for start, _ in runs], [line for _, line in runs]
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        _tables[id(code)] = found
    return found[1], found[2]


def _folder(package: str) -> str:
    spec = find_spec(package)
    return f"{Path(spec.origin).parent}/" if spec and spec.origin else f"<no {package}>"


_LONGEST = 110  # characters of a line that is shown whole
_OURS = f"{Path(__file__).parents[1]}/"
_CALLING_BACK = (_OURS, _folder("torch"), _folder("einops"), contextlib.__file__)
"""Files of functions that call back into a proxy, and of context managers around a block."""

# What is installed is nobody's experiment: NumPy, tokenizers, sklearn, test runners, notebooks.
_INSTALLED = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    *(site.getsitepackages() if hasattr(site, "getsitepackages") else ()),
    site.getusersitepackages(),
    *(path for path in sys.path if path.endswith(("site-packages", "dist-packages"))),
)
_LIBRARIES = (
    *_CALLING_BACK,
    *dict.fromkeys(f"{folder}/" for folder in _INSTALLED),
    "<frozen ",
)

_known: dict[str, bool] = {}
"""Whether a file is a library's, by its name: looking that up takes less than comparing paths."""


def is_library(file: str) -> bool:
    """Returns whether a source file belongs to Insitu, to Python or to an installed package.

    Args:
        file: its name, as a code object has it.
    """
    found = _known.get(file)
    if found is None:
        found = _known[file] = file.startswith(_LIBRARIES)
    return found


def user_frame(depth: int = 1) -> FrameType:
    """Returns the innermost frame on the stack that is not Insitu's own.

    It is the frame that a `with` statement stands in, also in an installed package that is built
    on Insitu.

    Args:
        depth: how many frames to leave out at once, known to be ours.
    """
    frame = _getframe(depth)
    if frame.f_code is users_code:
        return frame
    while frame.f_code.co_filename.startswith(_CALLING_BACK) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def here(depth: int = 2) -> Location:
    """Returns the user's current line."""
    return Location(*mark(depth + 1))


def mark(depth: int = 2) -> Mark:
    """Returns the user's current line in its cheapest form, for `Location(*mark)`.

    It is the innermost line outside of installed packages; where there is none, such as in a
    program that is itself installed, it is the innermost outside of Insitu.
    """
    global users_code
    frame = _getframe(depth)
    code = frame.f_code
    if code is users_code:
        return code, frame.f_lasti
    while is_library(code.co_filename):
        if frame.f_back is None:
            started = _started.get()
            if started is not None:
                return started
            frame = user_frame(depth + 1)
            return frame.f_code, frame.f_lasti
        frame = frame.f_back
        code = frame.f_code
    users_code = code
    return code, frame.f_lasti


def context_for_thread() -> Context:
    """Returns a copy of the context for a thread, whose errors name the user's current line.

    Nothing of the user's is on the stack of a thread that Insitu starts.
    """
    context = copy_context()
    context.run(_started.set, mark())
    return context


_started: ContextVar[Mark | None] = ContextVar("insitu_started", default=None)
"""The user's line that a thread works for."""

users_code: CodeType | None = None
"""A code object that is known to be the user's: looking at names takes most of the time.

What records most often compares it itself, and calls `mark` where it is another.
"""
