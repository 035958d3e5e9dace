"""Hooks on modules: taking what passes a site, and putting something else in its place."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.nn.modules import module as everywhere

from insitu.graph.errors import InsituError
from insitu.graph.node import NO_KWARGS, Kind, Place, Site
from insitu.graph.structure import clone, map_structure
from insitu.runtime.execution import Execution
from insitu.runtime.own_hooks import is_the_models
from insitu.runtime.plan import Plan

Moment = tuple[str, Kind, int, int]
"""A place in one step: a site, for all invocations."""

Hook = tuple[dict[Any, Any], dict[Any, bool] | None, object, Collection[Any] | None]
"""A hook as it lies in a module: the table, the table of those that take keywords, its key, and
the order of the other hooks, if that was changed."""


class Cut(Protocol):
    """An invocation's own part of what passes the sites of a whole batch."""

    def take(self, site: Site, value: Any) -> Any:
        """Returns the invocation's part of a value, as it would lie in memory alone.

        Args:
            site: where the value arrived.
            value: what arrived there, for the batch.
        """
        ...

    def put(self, site: Site, value: Any, own: Any) -> None:
        """Fills the invocation's part of a value with another.

        Args:
            site: where the value arrived.
            value: a copy of what arrived there, for the batch, widened. It is written to.
            own: what the invocation puts there.
        """
        ...

    def widen(self, site: Site, value: Any) -> Any:
        """Returns a value in which each row has a part that can be written to.

        Args:
            site: where the value arrived.
            value: what arrived there, for the batch; it is returned itself if that is so already.
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

    def returns_more(self, returned: Any) -> bool:
        """Returns whether only a run of the module makes all that it returns."""
        ...

    def stand_in(self, returned: Any, shown: Any) -> Any:
        """Returns what the module must return for an output to be shown, without its having run.

        Args:
            returned: what it would return, as fake tensors.
            shown: what is to be shown.

        Raises:
            ShapeError: if it would return something else.
        """
        ...


class Stop(BaseException):
    """Ends a forward early. No `Exception`, so that no model catches it."""


_CALL = "_compiled_call_impl"  # what `Module.__call__` enters, if a module has it
_INNER = "_call_impl"  # what it enters else: of the class, unless somebody stands around the call
_PLAIN: object = vars(nn.Module)[_INNER]


def put_hook(
    module: nn.Module, first: Moment, view: View | None, arrived: Callable[..., Any]
) -> Hook:
    """Puts a hook on a module that hands over one of its values.

    It goes straight into the module's tables: `register_forward_hook` takes 3 µs for a handle
    with weak references that nothing here needs, which is as much as all else done for a hook.

    Where it asks for nothing but the output, and there are no others, it goes around the call:
    torch calls a module with a hook in another way, which takes 1 µs more.
    """
    state = module.__dict__
    output = first[1] == "output"
    asks = view is not None and view.takes_arguments  # as the user's hooks have left them
    if (
        output
        and not asks
        and _CALL not in state
        and not state["_forward_hooks"]
        and type(module)._call_impl is _PLAIN
    ):
        state[_CALL] = partial(_called, arrived, first, view, module, state)
        return state, None, _CALL, None
    # A function is its own key: no number that torch hands out for its hooks equals it.
    key = partial(arrived, first, view)
    if output:
        hooks: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
        flags: dict[Any, bool] | None = module._forward_hooks_with_kwargs if asks else None
    else:
        hooks = module._forward_pre_hooks  # pyright: ignore[reportUnknownVariableType]
        flags = module._forward_pre_hooks_with_kwargs
    hooks[key] = key
    if flags is not None:
        flags[key] = True
    order = _put_own_last(module, hooks) if len(hooks) > 1 else None
    return hooks, flags, key, order


def _called(
    arrived: Callable[..., Any],
    first: Moment,
    view: View | None,
    module: Any,  # a module, of whose `forward` nothing is known
    state: Mapping[str, Any],
    /,  # the module's own arguments may have any name
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls a module and hands its output over."""
    if (
        state["_forward_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _INNER in state
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return _called_among_others(arrived, first, view, module, args, kwargs)
    if (
        state["_forward_pre_hooks"]
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
    ):
        output = module._call_impl(*args, **kwargs)
    else:
        output = module.forward(*args, **kwargs)  # which is all that `_call_impl` does then
    changed = arrived(first, view, module, args, output)
    return output if changed is None else changed


def _called_among_others(
    arrived: Callable[..., Any],
    first: Moment,
    view: View | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls a module that has other hooks by now, with a hook in its place among them."""
    key = partial(arrived, first, view)
    hooks: dict[Any, Any] = module._forward_hooks  # pyright: ignore[reportUnknownVariableType]
    # That of another name of the module was put after this one.
    later = [other for other in hooks if getattr(other, "func", None) == arrived]
    hooks[key] = key
    reorder(hooks, later)
    order = _put_own_last(module, hooks)
    try:
        return cast(Any, module)._call_impl(*args, **kwargs)
    finally:
        remove_hook((hooks, None, key, order))


def remove_hook(hook: Hook) -> None:
    """Takes a hook off its module, if it is still there."""
    table, flags, key, order = hook
    if key in table:
        del table[key]
        if flags is not None:
            del flags[key]
    if order is not None:
        reorder(table, order)


def _put_own_last(module: nn.Module, hooks: dict[Any, Any]) -> Collection[Any] | None:
    """Lets the hooks that belong to a module come after all others; returns the order before.

    A library's hook on its own module notes what the module returns, which the model may go on
    with: it has to note what was written. The user's hooks come before ours, as they stand.
    """
    own = [key for key, hook in hooks.items() if is_the_models(hook, module)]
    if not own:
        return None
    before = tuple(hooks)
    reorder(hooks, own)
    return before


def reorder(table: dict[Any, Any], order: Collection[Any]) -> None:
    """Brings entries of a table to its end, in some order.

    Args:
        table: the table.
        order: keys, of which some may be gone.
    """
    for key in order:
        if key in table:
            table[key] = table.pop(key)


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


def changed_value(
    execution: Execution,
    plan: Plan,
    place: Place,
    value: Any,
    found: Sequence[tuple[int, int]],
    cuts: Mapping[int, Cut | None],
    step: int = 0,
) -> Any:
    """What stands at a site after the writes of its invocations: always memory of its own.

    A module may go on to write into what it is given, and that must not reach a constant of the
    user's or a value that is still used.

    Args:
        execution: has the values.
        plan: its plan.
        place: where the value arrived.
        value: what arrived. It is returned itself if nothing is written.
        found: the nodes that read it, each with its invocation.
        cuts: the invocations' own parts of it.
        step: in which step it arrived.
    """
    fresh = value
    for index, invocation in found:
        if index not in plan.writes:
            continue
        own, cut = execution.written(index), cuts[invocation]
        if cut is None:
            known = own is value or index in plan.unshared
            fresh = own if known else _copied_where_new(own, value)
            continue
        site = Site(invocation, *place, step)
        if fresh is value:
            fresh = map_structure(clone, cut.widen(site, value))
        cut.put(site, fresh, own)
    return fresh


def _copied_where_new(own: Any, value: Any) -> Any:
    """A copy of a value, but for the tensors that were there before."""
    if type(own) is torch.Tensor:
        return own.clone()
    if type(own) is tuple and len(cast("tuple[Any, ...]", own)) == 1:  # a transformer block's
        return (_copied_where_new(own[0], value[0]),)
    before: set[int] = set()
    map_structure(lambda leaf: before.add(id(leaf)), value)
    return map_structure(lambda leaf: leaf if id(leaf) in before else clone(leaf), own)


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
