"""Listening to a run: what passes every place of a model is told, and may be exchanged.

It is for the library's own runs, which find something out. An experiment has hooks where it needs
some and nowhere else: see `passes.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from insitu.engine.functions import called_at_its_places
from insitu.engine.interpose import tapped
from insitu.engine.places import View, first_argument, handed_over
from insitu.graph.node import SEPARATOR, Kind, Place

Tell = Callable[[Place, Any], Any]


@contextmanager
def listening(
    modules: Mapping[str, nn.Module],
    views: Mapping[str, View],
    tell: Tell,
    inside: Collection[str] = (),
    caches: Collection[str] = (),
) -> Generator[Mapping[str, Any], None, None]:
    """Tells what passes the places of the runs in it, which are those of this thread.

    Args:
        modules: the tree of the module that runs, by path.
        views: how outputs are shown, by path.
        tell: is given each place and what passes there. What it returns takes its place, unless
            it is None.
        inside: the modules in whose forwards there are places too, those of the functions that
            they call.
        caches: the Python modules of caches: what they call is not a forward's own.

    Yields:
        What each module returned last, where `tell` is given how it is shown.
    """
    listener = _Listener(views, tell)
    with tapped() as taps:
        for owner in inside:
            taps.functions(modules[owner], partial(listener.visit, owner), caches)
        for path, part in modules.items():
            taps.before(part, partial(listener.before, path))
            taps.after(part, partial(listener.after, path))
        yield listener.returned


class _Listener:
    def __init__(self, views: Mapping[str, View], tell: Tell) -> None:
        self.returned: dict[str, Any] = {}
        self._views, self._tell = views, tell
        self._calls: Counter[str] = Counter()
        self._open: defaultdict[str, list[int]] = defaultdict(list)

    def before(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = self._begun(path)
        self._open[path].append(call)
        changed: Any = None
        for kind in _KINDS:
            if kind == "input" and not (args or kwargs):
                continue
            value: Any = (args, dict(kwargs))
            if kind == "input":
                value = first_argument(module, args, kwargs)
            told = self._tell((path, kind, call), value)
            if told is not None:
                args, kwargs = changed = handed_over(kind, None, module, args, (kwargs,), told)
        return changed

    def after(
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        self.returned[path] = output
        view = self._views.get(path)
        shown = output if view is None else view(output, args, kwargs)
        told = self._tell((path, "output", self._open[path].pop()), shown)
        return told if told is None or view is None else view.restore(output, told, args, kwargs)

    def visit(self, owner: str, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        path = f"{owner}{SEPARATOR}{name}"
        call = self._begun(path)

        def pass_on(kind: Kind, value: Any) -> Any:
            told = self._tell((path, kind, call), value)
            return value if told is None else told

        return called_at_its_places(function, args, dict(kwargs), pass_on)

    def _begun(self, path: str) -> int:
        """Counts a call, and returns its number."""
        call = self._calls[path]
        self._calls[path] += 1
        return call


_KINDS: tuple[Kind, ...] = ("inputs", "input")
