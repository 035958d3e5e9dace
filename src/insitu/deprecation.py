"""Names that are on their way out: they work, and say which name replaces them.

A name stays for a while beside its successor: `docs/dev/versions.md` says for how long. The warning
is a `DeprecationWarning` at the user's line, which Python shows once for each line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from insitu.graph.errors import OptionError
from insitu.graph.location import here, user_frame
from insitu.graph.user_warnings import warn_in

P = ParamSpec("P")
R = TypeVar("R")

_Values = Mapping[str, Mapping[str, str | None]]


def warn_deprecated(old: str, *, instead: str, goes_in: str) -> None:
    """Warns that something is deprecated, at the line outside of Insitu that has led here.

    Args:
        old: the old name, as users write it, such as "what=".
        instead: what to write instead, as users write it.
        goes_in: the version of Insitu in which the old name goes, such as "0.3".

    Raises:
        DeprecationWarning: if the user's filters turn such warnings into errors.
    """
    message = f"`{old}` is deprecated and goes in Insitu {goes_in}: write `{instead}` instead."
    # At a line of an installed package that is built on Insitu too: it is the one to mend.
    warn_in(user_frame(2), message, DeprecationWarning)


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


@dataclass(frozen=True, slots=True)
class Renames:
    """Arguments of a function that had other names, or other values.

    Attributes:
        function: the name of the function, for errors.
        names: the new name of each argument, by its old one.
        values: by the new name of an argument, the new value of each old one.
        goes_in: the version of Insitu in which the old ones go.
    """

    function: str
    names: Mapping[str, str]
    values: _Values
    goes_in: str

    def applied(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keyword arguments by their new names, and warns of each old one.

        Args:
            kwargs: the arguments as they were given.

        Raises:
            OptionError: if an argument is given by its old name and its new one.
        """
        found = dict(kwargs)
        for old, new in self.names.items():
            if old not in found:
                continue
            if new in found:
                raise OptionError(
                    f"`{self.function}` is given `{new}` and `{old}`, which is its old name: give "
                    f"`{new}` alone.",
                    here(),
                )
            warn_deprecated(f"{old}=", instead=f"{new}=", goes_in=self.goes_in)
            found[new] = found.pop(old)
        for name, values in self.values.items():
            given = found.get(name)
            if isinstance(given, str) and given in values:
                instead = f"{name}={values[given]!r}"
                warn_deprecated(f"{name}={given!r}", instead=instead, goes_in=self.goes_in)
                found[name] = values[given]
        return found


def renamed(
    *, goes_in: str, values: _Values | None = None, **names: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets arguments of a function be given by their old names, with a warning.

    Signatures and types have the new names alone. It is written above all other decorators, where
    `insitu.methods.boundary.guard` finds it. Old arguments by position are not looked at.

    Args:
        goes_in: the version of Insitu in which the old names go, such as "0.3".
        values: by the new name of an argument, the new value of each text that has another name.
        names: the new name of each argument, by its old one.

    Returns:
        A decorator.

    Raises:
        TypeError: if the function has no argument of a new name, or has one of an old name.

    Example:
        >>> import warnings
        >>> from insitu.deprecation import renamed
        >>> @renamed(what="part", goes_in="0.3")
        ... def ablate(*, part):
        ...     return part
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("default")
        ...     ablate(what="heads")
        'heads'
        >>> print(caught[0].message)
        `what=` is deprecated and goes in Insitu 0.3: write `part=` instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = signature(function).parameters
        for old, new in names.items():
            if new not in own or old in own:
                raise TypeError(f"{function.__qualname__} cannot have {old!r} renamed to {new!r}")
        renames = Renames(function.__qualname__, names, values or {}, goes_in)

        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            called: Callable[..., R] = function
            return called(*args, **renames.applied(kwargs))

        wrapped.__renames__ = renames  # pyright: ignore[reportAttributeAccessIssue]
        return wrapped

    return decorate


def renames_of(function: Callable[..., Any]) -> Renames | None:
    """Returns what `renamed` was told of a function, None if it has no old names."""
    return getattr(function, "__renames__", None)


def renamed_attribute(old: str, new: str, *, goes_in: str) -> property:
    """Returns a property for the old name of an attribute, which warns where it is read.

    Args:
        old: the old name.
        new: the new one.
        goes_in: the version of Insitu in which the old one goes.

    Returns:
        The property, to be assigned to the old name in the body of the class.
    """

    def read(owner: Any) -> Any:
        warn_deprecated(f".{old}", instead=f".{new}", goes_in=goes_in)
        return getattr(owner, new)

    return property(read, doc=f"The old name of `{new}`.")
