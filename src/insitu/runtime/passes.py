"""One pass: a call of the wrapped module with an experiment's hooks in it.

Hooks are put on the modules whose values are wanted and on no others. Each is removed when it
has fired, and all are removed when the pass ends, however it ends.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain
from threading import get_ident
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from insitu.graph.errors import InsituError
from insitu.graph.node import EVERY, Address, Kind, Site
from insitu.graph.structure import map_structure
from insitu.graph.writing import fitted
from insitu.runtime.execution import Execution
from insitu.runtime.gradients import Tape
from insitu.runtime.inside import SEPARATOR, watched

Place = tuple[str, Kind, int]
"""A module's path, which of its values, and in which call of the module."""

Moment = tuple[str, Kind, int, int]
"""A place in one step: a site, for all invocations."""

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

    def stand_in(self, returned: Any, shown: Any) -> Any:
        """Returns what the module must return for an output to be shown, without its having run.

        Args:
            returned: what it would return, as fake tensors.
            shown: what is to be shown.

        Raises:
            ShapeError: if it would return something else.
        """
        ...


class Deliver(Protocol):
    """Hands what passes a place to the experiment, for places that are no module's."""

    def __call__(self, kind: Kind, value: Any) -> Any:
        """Returns what is to stand there: the value itself, unless it is written.

        Args:
            kind: which value of the whole model it is.
            value: what passes.
        """
        ...


class Pass(NamedTuple):
    """One call of the wrapped module, or of its `generate`.

    Attributes:
        call: makes the call and returns what it returns.
        cuts: how each invocation finds its own part of a value, by number; None for an invocation
            that has the pass for itself.
        may_stop: whether the pass may end as soon as nothing is wanted from it any more.
        stepped: whether each call of the module is a step of its own.
    """

    call: Callable[[Deliver], Any]
    cuts: Mapping[int, Cut | None]
    may_stop: bool
    stepped: bool = False


class Passed(NamedTuple):
    """What came of a pass.

    Attributes:
        result: what the call returned, None if it was stopped early.
        missing: the nodes that read a site at which nothing arrived.
        steps: how many steps it had.
        calls: how often modules were called in it, by path, where somebody asked for a later call.
        stopped: whether the experiment ended it.
    """

    result: Any
    missing: list[int]
    steps: int
    calls: Mapping[str, int]
    stopped: bool


class _Stop(BaseException):
    """Ends a forward early. No `Exception`, so that no model catches it."""


_NO_KWARGS: Mapping[str, Any] = {}
_ABSENT = object()
_NO_CALLS: Mapping[str, int] = {}
_OF_MODULES = frozenset(["output", "input", "inputs"])
# What `torch.no_grad()` comes down to, without the objects that it takes to get there.
_set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def run_pass(
    execution: Execution,
    reads: Mapping[Address, int],
    single: Pass,
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
    returned: Mapping[str, Any] = _NO_KWARGS,
) -> Passed:
    """Runs a pass and gives an execution what arrives at its sites.

    Args:
        execution: takes the values.
        reads: the index of the node that reads it, for each site by its address.
        single: the pass.
        modules: the wrapped module's tree, by path.
        views: how outputs are shown, by path.
        returned: what modules that are skipped would return, as fake tensors, by path.
    """
    cuts, may_stop = single.cuts, single.may_stop
    writes, skips, stops = execution.writes, execution.skips, execution.stops
    after = execution.after
    mutated, differentiates = execution.mutated, execution.differentiates
    readers: dict[Moment, list[tuple[int, int]]] = {}
    clock = _Clock(readers, -1) if single.stepped else None
    for (invocation, path, kind, call, step), index in reads.items():
        if invocation in cuts:
            readers.setdefault((path, kind, call, step), []).append((index, invocation))
            if clock is None and (call or SEPARATOR in path):
                clock = _Clock(readers, 0)
    hooks: dict[Moment, Hook] = {}
    thread = get_ident()

    def arrived(
        moment: Moment, view: View | None, module: nn.Module, args: tuple[Any, ...], *rest: Any
    ) -> Any:
        if get_ident() != thread or execution.busy:
            return None  # somebody else's call of the module, beside ours or in an operation
        found = readers.pop(moment, None) if clock is None else clock.take(moment)
        if not found:
            return None
        if not may_stop and (clock is None or clock.is_done(moment)):
            table, flags, key = hooks.pop(moment)  # there are more forwards to come
            del table[key]
            if flags is not None:
                del flags[key]
        place = moment[:3] if clock is None else clock.place(moment)
        value = arriving = _passing(place[1], view, module, args, rest)
        if mutated and not mutated.isdisjoint(index for index, _ in found):
            value = _writable(modules[""], value, execution.tape)
        for index, invocation in found:
            cut = cuts[invocation]
            own = value if cut is None else cut.take(Site(invocation, *place), value)
            if after and index in after:
                own = execution.standing(after[index])
            execution.arrive(index, own)
            if mutated and cut is not None and index in mutated and not _shared(own, value):
                cut.put(Site(invocation, *place), value, own)
        if may_stop and not readers:
            raise _Stop
        if stops or skips:
            for index, _ in found:
                if index in stops:
                    raise _Stop
                if index in skips:
                    skipping[module] = index
        written = [(i, n, cuts[n]) for i, n in found if i in writes] if writes else ()
        if written:
            value = _changed(execution, place, value, written)
        if value is arriving:
            return None
        return _handed_over(place[1], view, module, args, rest, value)

    def stand_in(
        path: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        index = None if get_ident() != thread or execution.busy else skipping.pop(module, None)
        if index is None:
            return forward(*args, **kwargs)
        value = map_structure(_clone, execution.skipped(index))
        return execution.checked(
            index, lambda: _standing_in(views.get(path), returned[path], value)
        )

    def passing(kind: Kind, value: Any, path: str = "") -> Any:
        first: Moment = (path, kind, 0, 0)
        found = clock.take(first) if clock is not None else None
        if not found or clock is None:
            return value
        if mutated and not mutated.isdisjoint(index for index, _ in found):
            value = _writable(modules[""], value, execution.tape)
        for index, _ in found:  # of one invocation: batches are not made where these are wanted
            execution.arrive(index, execution.standing(after[index]) if index in after else value)
        if may_stop and not readers:
            raise _Stop
        written = [(i, n, cuts[n]) for i, n in found if i in writes]
        return _changed(execution, clock.place(first), value, written) if written else value

    def visit(
        owner: str,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if get_ident() != thread or execution.busy:
            return function(*args, **kwargs)
        path = f"{owner}{SEPARATOR}{name}"
        args, kwargs = passing("inputs", (args, kwargs), path)
        if args:
            args = (passing("input", args[0], path), *args[1:])
        elif kwargs:
            key = next(iter(kwargs))
            kwargs = {**kwargs, key: passing("input", kwargs[key], path)}
        return passing("output", function(*args, **kwargs), path)

    def begin_step(module: nn.Module, args: tuple[Any, ...]) -> None:
        if get_ident() == thread and not execution.busy and clock is not None:
            clock.step += 1
            clock.calls.clear()
            if clock.step:
                execution.next_step()
            if differentiates:  # `generate` turns it off
                _set_grad_enabled(True)
                after = cast("dict[Any, Any]", module._forward_hooks)
                after[end_step] = end_step

    def end_step(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _set_grad_enabled(False)
        cast("dict[Any, Any]", module._forward_hooks).pop(end_step, None)

    grad_enabled = torch.is_grad_enabled()
    result, stopped = None, False
    skipping: dict[nn.Module, int] = {}
    forwards: dict[nn.Module, Any] = {}
    owners: set[str] = set()
    watching: ExitStack | None = None
    try:
        for (_, path, *_), index in reads.items() if skips else ():
            if index in skips:
                module = modules[path]
                forwards.setdefault(module, vars(module).get("forward", _ABSENT))
                vars(module)["forward"] = partial(stand_in, path, module, module.forward)
        if single.stepped:
            before: dict[Any, Any] = modules[""]._forward_pre_hooks  # pyright: ignore[reportUnknownVariableType]
            before[begin_step] = begin_step
            hooks["", "inputs", -1, 0] = (before, None, begin_step)
        for moment in readers:
            path, kind, _, _ = moment
            first = moment if clock is None else (path, kind, 0, 0)
            if clock is not None and SEPARATOR in path:
                owners.add(path.partition(SEPARATOR)[0])
            elif first not in hooks and kind in _OF_MODULES:
                hooks[first] = _hook(modules[path], first, views.get(path), arrived)
        if owners:
            watching = ExitStack()
            for owner in owners:
                watching.enter_context(watched(modules[owner], partial(visit, owner)))
        _set_grad_enabled(differentiates)
        result = single.call(passing)
    except _Stop as stop:
        stop.__traceback__ = None  # it would keep every frame of the forward, and their tensors
        stopped = True
    finally:
        _set_grad_enabled(grad_enabled)
        if watching is not None:
            watching.close()
        if differentiates and single.stepped:
            cast("dict[Any, Any]", modules[""]._forward_hooks).pop(end_step, None)
        for table, flags, key in hooks.values():
            if key in table:
                del table[key]
                if flags is not None:
                    del flags[key]
        for module, forward in forwards.items():
            if forward is _ABSENT:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
        hooks.clear()  # they refer to `arrived`, which refers to them and to every value
    if single.stepped:
        execution.next_step()
    if clock is None:
        missing = [index for found in readers.values() for index, _ in found]
        return Passed(result, missing, 1, _NO_CALLS, stopped)
    return Passed(result, clock.missing(), clock.step + 1, clock.most, stopped)


class _Clock:
    """Tells calls and steps apart, where an experiment does.

    Args:
        readers: who waits for what, by moment. What has come is taken out.
        step: the step that runs, -1 if the first is yet to begin.

    Attributes:
        step: the step that runs.
        calls: how often each place was passed in it.
        most: how often each module was called in one step, at most.
    """

    def __init__(self, readers: dict[Moment, list[tuple[int, int]]], step: int) -> None:
        self.readers = readers
        self.step = step
        self.calls: Counter[Moment] = Counter()
        self.most: Counter[str] = Counter()
        self._came: set[Moment] = set()

    def take(self, first: Moment) -> list[tuple[int, int]]:
        """Returns who waits for what passes now at a place, given by its first moment."""
        path, kind, _, _ = first
        call = self.calls[first]
        self.calls[first] += 1
        self.most[path] = max(self.most[path], call + 1)
        every = (path, kind, call, EVERY)
        if every in self.readers:
            self._came.add(every)
        now = self.readers.pop((path, kind, call, self.step), ())
        return [*self.readers.get(every, ()), *now]

    def place(self, first: Moment) -> Place:
        """Returns the place that was passed last, given by its first moment."""
        return (first[0], first[1], self.calls[first] - 1)

    def is_done(self, first: Moment) -> bool:
        """Returns whether nobody waits for anything more at a place."""
        return not any(moment[:2] == first[:2] for moment in self.readers)

    def missing(self) -> list[int]:
        """Returns the nodes that read what never came."""
        return [
            index
            for moment, found in self.readers.items()
            if moment not in self._came
            for index, _ in found
        ]


def _hook(module: nn.Module, first: Moment, view: View | None, arrived: Callable[..., Any]) -> Hook:
    """Puts a hook on a module that hands over one of its values.

    It goes straight into the module's tables: `register_forward_hook` takes 3 µs for a handle
    with weak references that nothing here needs, which is as much as all else done for a hook.
    """
    # A function is its own key: no number that torch hands out for its hooks equals it.
    key = partial(arrived, first, view)
    if first[1] == "output":
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


def _writable(model: nn.Module, value: Any, tape: Tape | None) -> Any:
    """What may be written to in place: a copy of a parameter, and of all that autograd follows."""
    if tape is not None:
        tape.follow(value)  # a copy of what is followed is no leaf, and can be written to
        return map_structure(_clone, value)
    own = {_memory(tensor) for tensor in chain(model.parameters(), model.buffers())}
    found: list[int] = []
    map_structure(lambda leaf: found.append(_memory(leaf)), value)
    return value if own.isdisjoint(found) else map_structure(_clone, value)


def _shared(part: Any, whole: Any) -> bool:
    """Whether the memory of a part of a value is that of the value."""
    found: list[set[int]] = [set(), set()]
    for value, seen in zip((part, whole), found, strict=True):
        map_structure(lambda leaf, seen=seen: seen.add(_memory(leaf)), value)
    return found[0] <= found[1]


def _memory(leaf: Any) -> int:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else 0


def _changed(
    execution: Execution, place: Place, value: Any, written: Sequence[tuple[int, int, Cut | None]]
) -> Any:
    """What stands at a site after the writes of its invocations: always memory of its own.

    A module may go on to write into what it is given, and that must not reach a constant of the
    user's or a value that is still used.
    """
    fresh: Any = None
    for index, invocation, cut in written:
        own = execution.written(index)
        if cut is None:
            fresh = own if own is value else _copied_where_new(own, value)
            continue
        if fresh is None:
            fresh = map_structure(_clone, value)
        cut.put(Site(invocation, *place), fresh, own)
    return fresh


def _standing_in(view: View | None, returned: Any, value: Any) -> Any:
    """What a module that is skipped returns, checked against what it would have returned."""
    if view is not None:
        return view.stand_in(returned, value)
    return fitted(returned, value, block=False, move=False)


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
