"""Warnings at the user's line, however many frames the library has put above it."""

from __future__ import annotations

import warnings

from insitu.graph.location import Location, user_frame


def warn(message: str, category: type[Warning] = UserWarning, depth: int = 2) -> None:
    """Warns at the line outside of Insitu that has led here.

    Args:
        message: the warning.
        category: its kind.
        depth: how many frames to leave out at once, known to be ours.

    Raises:
        Warning: of this kind, if the user's filters turn such warnings into errors.
    """
    # Not `warnings.warn`: it counts frames, and between the user's line and this one there are as
    # many as the library happens to need.
    frame = user_frame(depth)
    place = Location(frame.f_code, frame.f_lasti)
    warnings.warn_explicit(
        message,
        category,
        place.file,
        place.line,
        # Python shows deprecations of `__main__` alone, unless it is told otherwise.
        module=frame.f_globals.get("__name__", "__main__"),
        # In this table Python remembers at which lines of the file it has warned.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
