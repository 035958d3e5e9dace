"""The runs of a model that the library makes for itself, most of them without data."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from insitu.engine.counting import Counts
from insitu.engine.eager import is_compiled, run_uncompiled
from insitu.engine.exclusive import Exclusive
from insitu.engine.interpose import set_aside
from insitu.engine.places import View
from insitu.engine.probe import Call, Probe, ambient, count, fake_run, probe
from insitu.engine.probe_cache import CallForm, ProbeCache, form_of, resized
from insitu.engine.tree import Tree
from insitu.graph.changes import Changes, changing
from insitu.graph.errors import UnknownShapeError
from insitu.graph.node import SEPARATOR, Place
from insitu.graph.objects import map_objects
from insitu.graph.ordinary import ordinary_tensors
from insitu.graph.structure import independent
from insitu.models.attention import OPTION, attending
from insitu.models.configuration import config_sizes

Passing = Mapping[Place, Any]
"""What passes places, as fake tensors."""

_MOST_COUNTS = 64  # forms of calls of which it is known what they take


class WithoutData(NamedTuple):
    """The module that runs on tensors without data.

    Attributes:
        module: the wrapped one, or one of the same shapes: kernels for quantised weights need data.
        modules: its tree, by path.
    """

    module: nn.Module
    modules: Mapping[str, nn.Module]


class OwnRuns:
    """What runs of one tree of a module have told, and how they are made.

    Args:
        tree: the wrapped module's tree.
        exclusive: who may use the module.
        caches: the Python modules of caches of keys and values.
        substitute: a module of the same shapes that runs without data; None for the wrapped one.
    """

    def __init__(
        self,
        tree: Tree,
        exclusive: Exclusive,
        caches: Collection[str],
        substitute: nn.Module | None = None,
    ) -> None:
        self._tree, self._exclusive, self._caches = tree, exclusive, caches
        self.substitute = substitute
        self._probes = ProbeCache(lambda: _thresholds(tree.root))
        self._counts: dict[str, Counts] = {}

    @property
    def without_data(self) -> WithoutData:
        """The module that runs on tensors without data, of the same shapes, and its tree."""
        if self.substitute is None:
            return WithoutData(self._tree.root, self._tree.modules)
        return _whole(self.substitute)

    def probe(self, call: Call, views: Mapping[str, View], inside: str | None) -> Probe:
        """Returns fake values of what passes every site in a call: as of `Subject`."""
        rest = f"{inside or ''} {ambient()}"
        signature = f"{rest} {call.signature()}"
        found = self._probed(signature, call, views, inside, rest)
        if isinstance(found, UnknownShapeError):  # what the model does depends on what it is given
            signature += call.contents()
            found = self._probed(signature, call, views, inside, None)
        if isinstance(found, UnknownShapeError):
            raise UnknownShapeError(*found.args)
        return found

    def inside(self, call: Call, views: Mapping[str, View], owners: Collection[str]) -> Passing:
        """Returns fake values of what passes functions in forwards of modules: as of `Subject`."""
        found = self._run(call, views, None, False, owners)
        if isinstance(found, UnknownShapeError):
            raise found
        return {place: value for place, value in found.seen.items() if SEPARATOR in place[0]}

    def depends_on_contents(self, call: Call) -> bool:
        """Returns whether a probe of a call depends on contents: as of `Subject`."""
        known = self._probes.get(f" {ambient()} {call.signature()}")
        return isinstance(known, UnknownShapeError)

    def _probed(
        self,
        signature: str,
        call: Call,
        views: Mapping[str, View],
        inside: str | None,
        rest: str | None,
    ) -> Probe | UnknownShapeError:
        """What a fake run gives: kept, between others, or made; with contents if `rest` is None.

        `rest` is what it depends on beside the call.
        """
        found = self._probes.get(signature)
        if found is not None:
            return found
        if rest is None:
            found = self._run(call, views, inside, True)
            self._probes.keep(signature, CallForm(signature, ()), found)
            return found
        form = form_of(call, rest)

        def run() -> Probe:
            made = self._probes.get(signature)
            if made is None:
                made = self._run(call, views, inside, False)
                self._probes.keep(signature, form, made)
            if isinstance(made, UnknownShapeError):
                raise UnknownShapeError(*made.args)
            return made

        found = self._probes.between(form, run)
        if found is None:
            try:
                found = run()
            except UnknownShapeError as error:
                found = error
            further = self._probes.next_size(form)
            if further is not None:
                other = resized(call, *further)
                key = f"{rest} {other.signature()}"
                if self._probes.get(key) is None:
                    made = self._run(other, views, inside, False)
                    self._probes.keep(key, form_of(other, rest), made)
        return found

    def _run(
        self,
        call: Call,
        views: Mapping[str, View],
        inside: str | None,
        contents: bool,
        owners: Collection[str] = (),
    ) -> Probe | UnknownShapeError:
        """Runs the module on fake tensors."""
        module, modules = self.without_data
        weight = next(self._tree.root.parameters(), None)
        kind = "cpu" if weight is None else weight.device.type  # "meta" before it is loaded
        options = (modules, views, inside, contents, self._caches, kind, owners)
        kwargs = dict(call.kwargs)
        implementation = kwargs.pop(OPTION, None)
        plain = Call(call.args, kwargs)
        with self.in_use(), attending(self._tree.root, implementation):
            try:
                found = probe(module, plain, *options)
                if module is self._tree.root and self._tree.has_changed():
                    found = probe(module, plain, _whole(module).modules, *options[1:])
                return found
            except UnknownShapeError as error:
                # Not the error itself: it holds every frame of the forward.
                return UnknownShapeError(*error.args)

    def count(self, call: Call) -> Counts:
        """Returns what a call of the module takes: as of `Subject`."""
        signature, known = f"{ambient()} {call.signature()}", self._counts
        if signature not in known:
            module, kwargs = self.without_data.module, dict(call.kwargs)
            with self.in_use(), attending(self._tree.root, kwargs.pop(OPTION, None)):
                known[signature] = count(module, Call(call.args, kwargs))
            while len(known) > _MOST_COUNTS:
                known.pop(next(iter(known)))
        return known[signature]

    @contextmanager
    def in_use(self) -> Generator[None, None, None]:
        """Waits for the wrapped module, and has it: see `Model.in_use`."""
        if self._exclusive.leads_to_here():
            yield
            return
        with changing() as changes:
            self._begin(changes)
            self._tree.keep(changes)
            self._exclusive.find_out(changes)
            yield

    def _begin(self, changes: Changes) -> None:
        """Has the module until the changes are undone, without the user's hooks on it."""
        parts = self._tree.parts
        self._exclusive.take_until(changes)
        set_aside(changes, parts)
        changes.gradients(torch.is_grad_enabled())  # notes it
        run_uncompiled(changes, is_compiled(parts))

    def settle(self, call: Call, loaded: bool) -> None:
        """Lets the module change its own tree, as a call of it does.

        Args:
            call: the call, which any run of the user's may make.
            loaded: whether it has weights.
        """
        module = self._tree.root
        # The user's own run will raise what this one does.
        with contextlib.suppress(Exception), changing() as changes:
            self._begin(changes)
            changes.enter(ordinary_tensors())
            changes.enter(torch.random.fork_rng())
            changes.gradients(False)
            if loaded:
                # A forward may fill what it is given, and the user's run is given the same.
                args, kwargs = map_objects(independent, tuple(call))
                module(*args, **kwargs)
            else:
                fake_run(module, call)


def _whole(module: nn.Module) -> WithoutData:
    return WithoutData(module, dict(module.named_modules(remove_duplicate=False)))


def _thresholds(module: nn.Module) -> frozenset[int] | None:
    """The sizes at which a model may begin to compute otherwise, None if nothing tells them."""
    config = getattr(module, "config", None)
    return config_sizes(config) if hasattr(config, "get_text_config") else None
