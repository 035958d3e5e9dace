"""Runs of a model in which values are read, and some changed, by plain hooks.

A proof must not rest on what it is to prove, so nothing here plans or records. A value is taken
where its name says that it stands, and brought into the form in which it is shown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from insitu.engine.interpose import tapped
from insitu.engine.keeping import undisturbed
from insitu.engine.listening import listening
from insitu.engine.probe import Call
from insitu.graph.node import SEPARATOR, Place
from insitu.graph.structure import clone, map_structure, tensors_of
from insitu.graph.writing import replaced
from insitu.models.attention import OPTION, attending
from insitu.models.blocks import CACHES
from insitu.tracing.forms import PerHead
from insitu.tracing.named import Named

if TYPE_CHECKING:
    from insitu.models.wrapped_module import WrappedModule

Tensor = torch.Tensor
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was read in one run.

    Attributes:
        places: what passed each place.
        results: the tensors of floating point that the model returned.
        returned: the first tensor that some modules returned, as a plain hook on them sees it.
    """

    places: Mapping[Place, Any] = field(default_factory=dict[Place, Any])
    results: tuple[Tensor, ...] = ()
    returned: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def at(self, named: Named) -> Tensor | None:
        """Returns a value in the form in which its name shows it, None if nothing came there."""
        value = self.raw(named)
        if value is None or named.form is None or isinstance(named.form, PerHead):
            return value
        try:
            return cast("Any", named.form).shown(value, self, None)
        except (IndexError, KeyError, RuntimeError):  # it is not of the form that it is taken for
            return None

    def raw(self, named: Named) -> Tensor | None:
        """Returns a value as it stands in the model, None if nothing came there."""
        value = self.places.get(place_of(named))
        try:
            for at in named.item:
                value = cast("Any", value)[at]
        except (IndexError, KeyError, TypeError):
            return None
        return value if isinstance(value, torch.Tensor) else None

    def read(self, path: str, kind: str, line: object = None, call: int = 0) -> Any:
        """Returns what passed a place: what forms ask an invocation for."""
        return self.places[cast("Place", (path, kind, call))]


class Runs:
    """Makes runs of a model.

    Args:
        model: the model, with its weights. The caller holds it (see `exclusive`).
        call: what it is called with.
        options: how it has to run for softmaxes to be seen.
    """

    def __init__(self, model: WrappedModule, call: Call, options: Mapping[str, Any]) -> None:
        self.model = model
        self.call = call
        self.options = options

    def run(
        self,
        reads: Collection[Named | Place],
        changes: Mapping[Named, Change] | None = None,
        options: Mapping[str, Any] | None = None,
        hooked: Collection[str] = (),
    ) -> Seen:
        """Runs the model once.

        Args:
            reads: what to read, by name or by place.
            changes: functions that change some values, in the form in which they are shown.
            options: how the model is to run in place of `self.options`.
            hooked: the paths of modules on which there are plain hooks too.
        """
        model = self.model
        changed = {place_of(named): (named, change) for named, change in (changes or {}).items()}
        wanted: set[Place] = set(changed)
        for one in (*reads, *(changes or {})):
            wanted.add(place_of(one) if isinstance(one, Named) else one)
            form = one.form if isinstance(one, Named) else None
            block = getattr(form, "block", None)  # `Rows` asks a block how its rows lie
            if block is not None:
                wanted.add((block, "input", 0))
        seen: dict[Place, Any] = {}

        def tell(place: Place, value: Any) -> Any:
            if place not in wanted:
                return None
            new = None
            if place in changed:
                seen[place] = value
                new = value = _changed(Seen(seen), value, *changed[place])
            seen[place] = map_structure(clone, value)
            return new

        inside = {place[0].partition(SEPARATOR)[0] for place in wanted if SEPARATOR in place[0]}
        kwargs = {**self.call.kwargs, **(self.options if options is None else options)}
        implementation = kwargs.pop(OPTION, None)
        with undisturbed(model.snapshot), attending(model.module, implementation):
            listens = listening(model.modules, model.views, tell, inside, CACHES)
            with listens, _hooked(model.modules, hooked) as first:
                returned = model.module(*self.call.args, **kwargs)
        return Seen(seen, _floats(returned), first)


def place_of(named: Named) -> Place:
    """Returns the place at which a value stands, as a whole with what it is a part of."""
    return named.path, named.kind, named.call


def _changed(seen: Seen, value: Any, named: Named, change: Change) -> Any:
    """A value of a place in which what a name stands for is another."""
    inner = value
    for at in named.item:
        inner = inner[at]
    form = cast("Any", named.form)
    if form is None or isinstance(form, PerHead):
        new = change(inner)
    else:
        new = form.restored(change(form.shown(inner, seen, None)), inner, seen, None)
    containers = [value]
    for at in named.item[:-1]:
        containers.append(containers[-1][at])
    for at in reversed(named.item):
        container = containers.pop()
        new = replaced(container, at, new)
    return new


@contextlib.contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], paths: Collection[str]
) -> Generator[dict[str, Tensor], None, None]:
    """Puts plain hooks on modules, and gives the first tensor that each of them returns."""
    found: dict[str, Tensor] = {}

    def keep(path: str, *called: Any) -> None:
        tensors = tensors_of(called[-1])
        if tensors and path not in found:
            found[path] = tensors[0].detach().clone()

    with tapped() as taps:
        for path in paths:
            taps.after(modules[path], partial(keep, path))
        yield found


def _floats(returned: Any) -> tuple[Tensor, ...]:
    tensors = tensors_of(returned)
    return tuple(one.detach().clone() for one in tensors if one.is_floating_point())
