"""Warnings at the user's line.

`warnings.warn` counts frames, and between the user's line and the one that warns there are as many
as the library happens to need. Python shows a warning once for each line, so that a wrong line also
decides how often it is shown.
"""

from __future__ import annotations

import warnings
from types import FrameType

from insitu.graph.location import Location, is_library, user_frame


def warn_user(message: str) -> None:
    """Warns at the innermost line that is outside of installed packages.

    Args:
        message: what to say.

    Raises:
        UserWarning: if the user's filters turn such warnings into errors.
    """
    outermost = user_frame(2)
    frame: FrameType | None = outermost
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    warn_in(frame or outermost, message, UserWarning)


def warn_in(frame: FrameType, message: str, category: type[Warning]) -> None:
    """Warns at the current line of a frame.

    Args:
        frame: the frame.
        message: what to say.
        category: the class of the warning.

    Raises:
        Warning: of that class, if the user's filters turn such warnings into errors.
    """
    place = Location(frame.f_code, frame.f_lasti)
    warnings.warn_explicit(
        message,
        category,
        place.file,
        place.line,
        # Python shows some warnings of `__main__` alone, unless it is told otherwise.
        module=frame.f_globals.get("__name__", "__main__"),
        # In this table Python remembers at which lines of the file it has warned.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
