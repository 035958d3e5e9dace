"""One pass: a call of the wrapped module with an experiment's hooks in it.

Hooks are put on the modules whose values are wanted and on no others. Each is removed when it
has fired, and all are removed when the pass ends, however it ends.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from insitu.graph.errors import InsituError
from insitu.graph.node import Address, Kind, Site
from insitu.runtime.execution import Execution

Place = tuple[str, Kind]
"""A module's path and which of its values: a site, for all invocations."""

Hook = tuple[dict[Any, Any], dict[Any, bool] | None, Callable[..., None]]
"""A hook as it lies in a module: the table, the table of those that take keywords, and its key."""

Cut = Callable[[Site, Any], Any]
"""Takes an invocation's own part out of what arrived at a site for the whole batch."""


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


class Pass(NamedTuple):
    """One call of the wrapped module.

    Attributes:
        call: makes the call and returns what it returns.
        cuts: how each invocation finds its own part of a value, by number; None for an invocation
            that has the pass for itself.
        may_stop: whether the pass may end as soon as nothing is wanted from it any more.
    """

    call: Callable[[], Any]
    cuts: Mapping[int, Cut | None]
    may_stop: bool


class _Stop(BaseException):
    """Ends a forward early. No `Exception`, so that no model catches it."""


_NO_KWARGS: Mapping[str, Any] = {}
# What `torch.no_grad()` comes down to, without the objects that it takes to get there.
_set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def run_pass(
    execution: Execution,
    reads: Mapping[Address, int],
    single: Pass,
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
) -> tuple[Any, list[int]]:
    """Runs a pass and gives an execution what arrives at its sites.

    Args:
        execution: takes the values.
        reads: the index of the node that reads it, for each site by its address.
        single: the pass.
        modules: the wrapped module's tree, by path.
        views: how outputs are shown, by path.

    Returns:
        What the call returned, None if it was stopped early, and the indices of the nodes that
        read a site at which nothing arrived.
    """
    cuts, may_stop = single.cuts, single.may_stop
    readers: dict[Place, list[tuple[int, int]]] = {}
    for (invocation, path, kind), index in reads.items():
        if invocation in cuts:
            readers.setdefault((path, kind), []).append((index, invocation))
    hooks: dict[Place, Hook] = {}
    thread = get_ident()

    def arrived(
        place: Place, view: View | None, module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> None:
        if get_ident() != thread:
            return  # somebody else's call of the module, beside ours
        found = readers.pop(place, None)
        if found is None:
            return  # a later call of the module
        if not may_stop:  # there are more forwards to come, and they need no hook here
            table, flags, key = hooks.pop(place)
            del table[key]
            if flags is not None:
                del flags[key]
        value = _passing(place[1], view, module, args, rest)
        for index, invocation in found:
            cut = cuts[invocation]
            execution.arrive(index, value if cut is None else cut(Site(invocation, *place), value))
        if may_stop and not readers:
            raise _Stop

    grad_enabled = torch.is_grad_enabled()
    try:
        for place in readers:
            hooks[place] = _hook(modules[place[0]], place, views.get(place[0]), arrived)
        _set_grad_enabled(False)
        result = single.call()
        return result, [index for found in readers.values() for index, _ in found]
    except _Stop as stop:
        stop.__traceback__ = None  # it would keep every frame of the forward, and their tensors
        return None, []
    finally:
        _set_grad_enabled(grad_enabled)
        for table, flags, key in hooks.values():
            if key in table:
                del table[key]
                if flags is not None:
                    del flags[key]
        hooks.clear()  # they refer to `arrived`, which refers to them and to every value


def _hook(module: nn.Module, place: Place, view: View | None, arrived: Callable[..., None]) -> Hook:
    """Puts a hook on a module that hands over one of its values.

    It goes straight into the module's tables: `register_forward_hook` takes 3 µs for a handle
    with weak references that nothing here needs, which is as much as all else done for a hook.
    """
    # A function is its own key: no number that torch hands out for its hooks equals it.
    key = partial(arrived, place, view)
    if place[1] == "output":
        hooks: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
        flags: dict[Any, bool] | None = None
        if view is not None and view.takes_arguments:
            flags = module._forward_hooks_with_kwargs
    else:
        hooks = module._forward_pre_hooks  # pyright: ignore[reportUnknownVariableType]
        flags = module._forward_pre_hooks_with_kwargs
    hooks[key] = key
    if flags is not None:
        flags[key] = True
    return hooks, flags, key


def _passing(
    kind: Kind, view: View | None, module: nn.Module, args: tuple[Any, ...], rest: tuple[Any, ...]
) -> Any:
    """The value that a hook was called for, from what torch calls it with."""
    if kind == "output":
        output = rest[-1]
        if view is None:
            return output
        return view(output, args, rest[0] if view.takes_arguments else _NO_KWARGS)
    (kwargs,) = rest
    return (args, dict(kwargs)) if kind == "inputs" else first_argument(module, args, kwargs)


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
    for name in _parameter_names(type(module)):
        if name in kwargs:
            return kwargs[name]
    for value in kwargs.values():
        return value
    raise InsituError("The module was called without arguments, so it has no `.input`.")


@lru_cache(maxsize=1024)
def _parameter_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """The parameters of a class's forward, in their order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]
