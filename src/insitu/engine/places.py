"""What passes a place of a module's call: taken from what torch gives a hook, and put back."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

from torch import nn

from insitu.graph.errors import InsituError
from insitu.graph.node import NO_KWARGS, Kind

Moment = tuple[str, Kind, int, int]
"""A place in one step: a site, for all invocations."""


class View(Protocol):
    """How the output of a module is shown to the user, where that differs from what it returns."""

    @property
    def takes_arguments(self) -> bool:
        """Whether it looks at the arguments of the module's call."""
        ...

    def __call__(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the output to show.

        Args:
            output: what the module returned.
            args: the positional arguments that it was called with.
            kwargs: its keyword arguments.
        """
        ...

    def restore(
        self, output: Any, shown: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Returns what the module must return for its output to be shown as something else.

        Args:
            output: what it returned.
            shown: the value that is to be shown.
            args: as of `__call__`.
            kwargs: as of `__call__`.
        """
        ...

    def returns_more(self, returned: Any) -> bool:
        """Returns whether only a run of the module makes all that it returns."""
        ...

    def stand_in(self, returned: Any, shown: Any) -> Any:
        """Returns what the module must return for an output to be shown, without its having run.

        Args:
            returned: what it would return, as fake tensors.
            shown: the value that is to be shown.

        Raises:
            ShapeError: if it would return something else.
        """
        ...


class Stop(BaseException):
    """Ends a forward early. No `Exception`, so that no model catches it."""


def passing_value(
    kind: Kind, view: View | None, module: nn.Module, args: tuple[Any, ...], rest: tuple[Any, ...]
) -> Any:
    """The value that a hook was called for, from what torch calls it with."""
    if kind == "output":
        output = rest[-1]
        if view is None:
            return output
        return view(output, args, rest[0] if view.takes_arguments else NO_KWARGS)
    (kwargs,) = rest
    return (args, dict(kwargs)) if kind == "inputs" else first_argument(module, args, kwargs)


def handed_over(
    kind: Kind,
    view: View | None,
    module: nn.Module,
    args: tuple[Any, ...],
    rest: tuple[Any, ...],
    value: Any,
) -> Any:
    """What a hook returns, so that a value takes the place of the one it was called for."""
    if kind == "output":
        if view is None:
            return value
        return view.restore(rest[-1], value, args, rest[0] if view.takes_arguments else NO_KWARGS)
    if kind == "inputs":
        return value
    (kwargs,) = rest
    if args:
        return (value, *args[1:]), kwargs
    return args, {**kwargs, _first_keyword(module, kwargs): value}


def first_argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the first argument of a call, in the order of the module's own signature.

    Args:
        module: the module that was called.
        args: its positional arguments.
        kwargs: its keyword arguments, in any order.

    Raises:
        InsituError: if the call has none.
    """
    if args:
        return args[0]
    if kwargs:
        return kwargs[_first_keyword(module, kwargs)]
    raise InsituError("The module was called without arguments, so it has no `.input`.")


def _first_keyword(module: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The name of the first argument of a call without positional ones."""
    for name in _parameter_names(type(module)):
        if name in kwargs:
            return name
    return next(iter(kwargs))


@lru_cache(maxsize=1024)
def _parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The parameters of a class's forward, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
