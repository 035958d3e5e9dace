"""Listening to a run: what passes every place of a model is told, and may be exchanged.

It is for the library's own runs, which find something out. An experiment has hooks where it needs
some and nowhere else: see `passes.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from insitu.graph.node import SEPARATOR, Kind, Place
from insitu.runtime.hooks import View, first_argument, handed_over
from insitu.runtime.inside import watched


class Listening:
    """A context in which it is told what passes the places of runs.

    Args:
        modules: the tree of the module that runs, by path.
        views: how outputs are shown, by path.
        tell: is given each place and what passes there. What it returns takes its place, unless
            it is None.
        inside: the modules in whose forwards there are places too, those of the functions that
            they call.
        caches: the Python modules of caches: what they call is not a forward's own.

    Attributes:
        returned: what each module returned last, where `tell` is given how it is shown.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        views: Mapping[str, View],
        tell: Callable[[Place, Any], Any],
        inside: Collection[str] = (),
        caches: Collection[str] = (),
    ) -> None:
        self.returned: dict[str, Any] = {}
        self._modules, self._views, self._tell = modules, views, tell
        self._inside, self._caches = inside, caches
        self._calls: Counter[str] = Counter()
        self._open: defaultdict[str, list[int]] = defaultdict(list)
        self._changes = ExitStack()

    def __enter__(self) -> Listening:
        with ExitStack() as changes:
            for owner in self._inside:
                visit = partial(self._visit, owner)
                changes.enter_context(watched(self._modules[owner], visit, self._caches))
            for path, part in self._modules.items():
                before, after = partial(self._before, path), partial(self._after, path)
                hook = part.register_forward_pre_hook(before, with_kwargs=True)
                changes.callback(hook.remove)
                hook = part.register_forward_hook(after, with_kwargs=True)
                changes.callback(hook.remove)
            self._changes = changes.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._changes.close()

    def _before(
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

    def _after(
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

    def _visit(self, owner: str, name: str, function: Any, args: Any, kwargs: Any) -> Any:
        path = f"{owner}{SEPARATOR}{name}"
        call = self._begun(path)
        told = self._tell((path, "inputs", call), (args, dict(kwargs)))
        if told is not None:
            args, kwargs = told
        if args:
            told = self._tell((path, "input", call), args[0])
            if told is not None:
                args = (told, *args[1:])
        result = function(*args, **kwargs)
        told = self._tell((path, "output", call), result)
        return result if told is None else told

    def _begun(self, path: str) -> int:
        """Counts a call, and returns its number."""
        call = self._calls[path]
        self._calls[path] += 1
        return call


_KINDS: tuple[Kind, ...] = ("inputs", "input")
