"""Names that are on their way out: they work, and say which name replaces them.

A name stays for a while beside its successor: `docs/dev/versions.md` says for how long. The warning
is a `DeprecationWarning` at the user's line, which Python shows once for each line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from insitu.graph.location import Location, user_frame

P = ParamSpec("P")
R = TypeVar("R")


def warn_deprecated(old: str, *, instead: str, goes_in: str) -> None:
    """Warns that something is deprecated, at the line outside of Insitu that has led here.

    Args:
        old: the old name, as users write it, such as "what=".
        instead: what to write instead, as users write it.
        goes_in: the version of Insitu in which the old name goes, such as "0.3".

    Raises:
        DeprecationWarning: if the user's filters turn such warnings into errors.
    """
    # Not `warnings.warn`: it counts frames, and between the user's line and this one there are as
    # many as the library happens to need.
    frame = user_frame(2)
    place = Location(frame.f_code, frame.f_lasti)
    warnings.warn_explicit(
        f"`{old}` is deprecated and goes in Insitu {goes_in}: write `{instead}` instead.",
        DeprecationWarning,
        place.file,
        place.line,
        # Python shows such warnings of `__main__` alone, unless it is told otherwise.
        module=frame.f_globals.get("__name__", "__main__"),
        # In this table Python remembers at which lines of the file it has warned.
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def deprecated(
    old: str, *, instead: str, goes_in: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function warn where it is called, and then do what it always did.

    Args:
        old: the old name, as users write it.
        instead: what to write instead, as users write it.
        goes_in: the version of Insitu in which the old name goes, such as "0.3".

    Returns:
        A decorator.

    Example:
        >>> import warnings
        >>> from insitu.deprecation import deprecated
        >>> @deprecated("double", instead="twice", goes_in="0.3")
        ... def double(number):
        ...     return 2 * number
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("default")
        ...     double(4)
        8
        >>> print(caught[0].message)
        `double` is deprecated and goes in Insitu 0.3: write `twice` instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            warn_deprecated(old, instead=instead, goes_in=goes_in)
            return function(*args, **kwargs)

        return wrapped

    return decorate
