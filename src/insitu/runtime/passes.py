"""One pass: a call of the wrapped module with an experiment's hooks in it.

Hooks are put on the modules whose values are wanted and on no others. Each is removed when it
has fired, and all are removed when the pass ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from insitu.graph.errors import InsituError
from insitu.graph.node import Kind, Site
from insitu.runtime.execution import Execution

Cut = Callable[[Site, Any], Any]
"""Takes an invocation's own part out of what arrived at a site for the whole batch."""


class View(Protocol):
    """How the output of a module is shown to the user, where that differs from what it returns."""

    def __call__(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns the output to show.

        Args:
            output: what the module returned.
            args: the positional arguments that it was called with.
            kwargs: its keyword arguments.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
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


def run_pass(
    execution: Execution,
    reads: Mapping[Site, int],
    single: Pass,
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
) -> tuple[Any, set[tuple[str, Kind]]]:
    """Runs a pass and gives an execution what arrives at its sites.

    Args:
        execution: takes the values.
        reads: the sites that are read, with the index of the reading node.
        single: the pass.
        modules: the wrapped module's tree, by path.
        views: how outputs are shown, by path.

    Returns:
        What the call returned, None if it was stopped early, and the sites at which nothing
        arrived, as paths and kinds.
    """
    wanted: dict[tuple[str, Kind], list[tuple[Site, int]]] = {}
    for site, index in reads.items():
        if site.invocation in single.cuts:
            wanted.setdefault((site.path, site.kind), []).append((site, index))
    pending: set[tuple[str, Kind]] = set(wanted)
    handles: list[RemovableHandle] = []

    def listen(path: str, kind: Kind) -> None:
        readers = wanted[path, kind]

        def arrived(value: Any) -> None:
            handle.remove()
            pending.discard((path, kind))
            if len(single.cuts) == 1:
                ((site, index),) = readers
                cut = single.cuts[site.invocation]
                execution.arrive({index: value if cut is None else cut(site, value)})
            else:
                arrivals: dict[int, Any] = {}
                for site, index in readers:
                    cut = single.cuts[site.invocation]
                    arrivals[index] = value if cut is None else cut(site, value)
                execution.arrive(arrivals)
            if not pending and single.may_stop:
                raise _Stop

        handle = _hook(modules[path], kind, views.get(path), arrived)
        handles.append(handle)

    try:
        for path, kind in wanted:
            listen(path, kind)
        with torch.no_grad():
            return single.call(), pending
    except _Stop as stop:
        stop.__traceback__ = None  # it would keep every frame of the forward, and their tensors
        return None, pending
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    module: nn.Module, kind: Kind, view: View | None, arrived: Callable[[Any], None]
) -> RemovableHandle:
    """Puts a hook on a module that hands over one of its values."""
    if kind == "inputs":

        def inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived((args, dict(kwargs)))

        return module.register_forward_pre_hook(inputs, with_kwargs=True)
    if kind == "input":

        def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrived(first_argument(args, kwargs))

        return module.register_forward_pre_hook(first, with_kwargs=True)
    if view is None:

        def output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            arrived(output)

        return module.register_forward_hook(output)

    def viewed(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        arrived(view(output, args, kwargs))

    return module.register_forward_hook(viewed, with_kwargs=True)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns the first argument of a call, be it positional or not.

    Raises:
        InsituError: if the call has none.
    """
    if args:
        return args[0]
    for value in kwargs.values():
        return value
    raise InsituError("The module was called without arguments, so it has no `.input`.")
