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
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from insitu.graph.errors import InsituError
from insitu.graph.node import Address, Kind, Site
from insitu.graph.structure import map_structure
from insitu.runtime.execution import Execution

Place = tuple[str, Kind]
"""A module's path and which of its values: a site, for all invocations."""

Hook = tuple[dict[Any, Any], dict[Any, bool] | None, Callable[..., Any]]
"""A hook as it lies in a module: the table, the table of those that take keywords, and its key."""


class Cut(Protocol):
    """An invocation's own part of what passes the sites of a whole batch."""

    def take(self, site: Site, value: Any) -> Any:
        """Returns the invocation's part of a value.

        Args:
            site: where the value arrived.
            value: what arrived there, for the batch.
        """
        ...

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the invocation's part of a value with another.

        Args:
            site: where the value arrived.
            value: a copy of what arrived there, for the batch. It is written to.
            own: what the invocation puts there.
        """
        ...


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
            shown: what is to be shown.
            args: as of `__call__`.
            kwargs: as of `__call__`.
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
    writes = execution.writes
    readers: dict[Place, list[tuple[int, int]]] = {}
    for (invocation, path, kind), index in reads.items():
        if invocation in cuts:
            readers.setdefault((path, kind), []).append((index, invocation))
    hooks: dict[Place, Hook] = {}
    thread = get_ident()

    def arrived(
        place: Place, view: View | None, module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> Any:
        if get_ident() != thread:
            return None  # somebody else's call of the module, beside ours
        found = readers.pop(place, None)
        if found is None:
            return None  # a later call of the module
        if not may_stop:  # there are more forwards to come, and they need no hook here
            table, flags, key = hooks.pop(place)
            del table[key]
            if flags is not None:
                del flags[key]
        value = _passing(place[1], view, module, args, rest)
        for index, invocation in found:
            cut = cuts[invocation]
            own = value if cut is None else cut.take(Site(invocation, *place), value)
            execution.arrive(index, own)
        if may_stop and not readers:
            raise _Stop
        if not writes:
            return None
        written = [(i, n, cuts[n]) for i, n in found if i in writes]
        if not written:
            return None
        changed = _changed(execution, place, value, written)
        return _handed_over(place[1], view, module, args, rest, changed)

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


def _hook(module: nn.Module, place: Place, view: View | None, arrived: Callable[..., Any]) -> Hook:
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


def _changed(
    execution: Execution, place: Place, value: Any, written: list[tuple[int, int, Cut | None]]
) -> Any:
    """What stands at a site after the writes of its invocations: always memory of its own.

    A module may go on to write into what it is given, and that must not reach a constant of the
    user's or a value that is still used.
    """
    fresh: Any = None
    for index, invocation, cut in written:
        own = execution.written(index)
        if cut is None:
            return own if own is value else _copied_where_new(own, value)
        if fresh is None:
            fresh = map_structure(_clone, value)
        cut.put(Site(invocation, *place), fresh, own)
    return fresh


def _copied_where_new(own: Any, value: Any) -> Any:
    """A copy of a value, but for the tensors that were there before."""
    if type(own) is torch.Tensor:
        return own.clone()
    if type(own) is tuple and len(cast("tuple[Any, ...]", own)) == 1:  # a transformer block's
        return (_copied_where_new(own[0], value[0]),)
    before: set[int] = set()
    map_structure(lambda leaf: before.add(id(leaf)), value)
    return map_structure(lambda leaf: leaf if id(leaf) in before else _clone(leaf), own)


def _clone(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _handed_over(
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
        return view.restore(rest[-1], value, args, rest[0] if view.takes_arguments else _NO_KWARGS)
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
