"""Standard names: values of a run by what they are, wherever a model has them.

A name stands for a site and the form in which it is shown. Reading it records the operations that
give it that form, and writing it those that undo them, so that a graph knows nothing of names.
"""

# To type checkers a proxy is a tensor.
# pyright: reportPrivateUsage=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from weakref import ref as weakref

import torch

from insitu.graph.differentiation import read_gradient, write_gradient
from insitu.graph.dispatch import AUGMENTED
from insitu.graph.encoding import add_node
from insitu.graph.errors import OperationError, PathError, ShapeError, UnknownShapeError
from insitu.graph.intervention import write_part
from insitu.graph.location import Location, Mark, here, mark
from insitu.graph.node import NO_KWARGS, Kind, Ref, table_of
from insitu.graph.operations import REPLACE
from insitu.graph.proxy import AnyProxy, Proxy, StructureProxy
from insitu.graph.recorded import Recorded
from insitu.graph.recording import Recording
from insitu.graph.saved import SavedTensor, become
from insitu.graph.saved_proxy import SavedProxy, SavedSteps
from insitu.graph.standing import holds
from insitu.tracing.forms import Computed, Form

if TYPE_CHECKING:
    from insitu.tracing.invocation import Invocation


@dataclass(frozen=True, slots=True)
class Named:
    """A value by a standard name.

    Attributes:
        path: the path of the module, or of the function in its forward.
        kind: which of its values.
        call: which of its calls.
        item: where in that value it is.
        form: how it is shown, None for as it is.
        options: how the model has to run for it to be there.
        once: whether it is made in the first step of a generation only.
    """

    path: str
    kind: Kind
    call: int = 0
    item: tuple[int | str, ...] = ()
    form: Form | None = None
    options: tuple[tuple[str, Any], ...] = ()
    once: bool = False

    def read(self, invocation: Invocation, line: Mark) -> NamedProxy:
        """Returns a proxy for the value.

        Args:
            invocation: the invocation whose value it is.
            line: the user's line.

        Raises:
            PathError: if there is no such value in the step that lines mean now.
        """
        if self.once and invocation.current_step != 0:
            raise PathError(
                "Keys and values of an encoder's states are made in step 0 and kept: read and "
                "write them there.",
                Location(*line),
            )
        site = invocation.read(self.path, self.kind, line, self.call)
        recording = site._recording
        # Patterns of attention exist only with an implementation that computes them.
        if self.options:
            invocation.demand(dict(self.options))
            table_of(recording.graph, "unfused", set).add(recording.graph.original(site._ref.index))
        # Few blocks use standard names, and none of the others pays for the table.
        if recording.shown is None:
            recording.shown = {}
        key = (site._ref.index, self)
        found = recording.shown.get(key)
        if found is None:
            start = len(recording.graph)
            value: Proxy = site
            for at in self.item:
                value = value[at]
            shown = value if self.form is None else self.form.shown(value, invocation, line)
            recording.forget_contexts(start)  # a site is read, wherever its name stands
            found = (value._ref, shown._ref)
            if isinstance(self.form, Computed):  # anew by each line: of what has been written since
                self._refuse_writes(recording, shown._ref)
            else:
                recording.shown[key] = found
        base, source = found
        kind = ComputedProxy if isinstance(self.form, Computed) else NamedProxy
        proxy = kind(recording, source)
        proxy._name, proxy._source, proxy._reading = self, base, weakref(invocation)
        proxy._step = invocation.current_step
        return proxy

    def _refuse_writes(self, recording: Recording, shown: Ref) -> None:
        """Notes that the value read by this name is no part of the model."""
        instead = "assign to it, or to a part of it by an index."
        table_of(recording, "computed")[shown.index] = instead

    def _checked(self, current: Proxy, value: Any, line: Mark) -> None:
        """Raises if something cannot be brought into the form of the site.

        Raises:
            OperationError: if it is no tensor.
            ShapeError: if it has another shape, as far as shapes are known.
        """
        if not isinstance(value, AnyProxy | torch.Tensor):
            kind = type(value).__name__
            raise OperationError(
                f"`{current.written()}` is written with a tensor of its shape, not with a value of "
                f"type {kind}.",
                Location(*line),
            )
        expected = found = None
        constant = isinstance(value, torch.Tensor) and not isinstance(value, AnyProxy)
        if constant or isinstance(self.form, Computed):
            with contextlib.suppress(UnknownShapeError):
                expected, found = current.shape, value.shape
        if expected is not None and expected != found:
            raise ShapeError(
                f"`{current.written()}` has shape {tuple(expected)}, and is given {found}.",
                Location(*line),
            )

    def write(self, invocation: Invocation, value: Any, line: Mark) -> None:
        """Puts a value in the place of the one that there is.

        Args:
            invocation: the invocation whose value it is.
            value: of the shape that is shown.
            line: the user's line.
        """
        current = self.read(invocation, line)
        recording = current._recording
        start = len(recording.graph)
        self._write(current, invocation, value, line)
        recording.forget_contexts(start)  # as of a site that is assigned

    def _write(self, current: Proxy, invocation: Invocation, value: Any, line: Mark) -> None:
        recording = current._recording
        if not isinstance(self.form, Computed) and holds(recording, current._ref, value):
            return
        site = invocation.read(self.path, self.kind, line, self.call)
        if self.form is not None:
            self._checked(current, value, line)
        shown = value
        if isinstance(self.form, Computed) and not isinstance(value, AnyProxy):
            shown = current.clone()  # so that there is something for later lines to read
            shown[...] = value
        if self.form is not None:
            base = Proxy(recording, current._source)
            value = self.form.restored(value, base, invocation, line)
        if not self.item:
            invocation.write(self.path, self.kind, value, line, self.call)
            if isinstance(self.form, Computed):  # later lines read what was written
                written = invocation.read(self.path, self.kind, line, self.call)
                recording.shown = recording.shown or {}
                recording.shown[written._ref.index, self] = (written._ref, shown._ref)
                self._refuse_writes(recording, shown._ref)
            return
        block = isinstance(site, StructureProxy)
        # From the inside out: the entry of the innermost container, that container, and so on.
        for depth in range(len(self.item) - 1, 0, -1):
            container: Proxy = site
            for at in self.item[:depth]:
                container = container[at]
            args = (Recorded(recording, container._ref), self.item[depth], value)
            value = Recorded(recording, add_node(recording, REPLACE, args, NO_KWARGS, line))
        write_part(recording, site._ref, self.item[0], value, block, line)


class NamedProxy(Proxy):
    """Stands for a value by a standard name.

    Its gradient is that of the value as it flows through the model, in the form that it is shown
    in.
    """

    __slots__ = ("_name", "_reading", "_source", "_step")
    _name: Named
    _step: int
    _source: Ref
    _reading: weakref[Invocation]  # weak: it holds the model, and a proxy may be kept for long

    @property
    def _invocation(self) -> Invocation:
        """The invocation that it belongs to, while its block is open."""
        return cast("Invocation", self._reading())

    def save(
        self,
        name: str | None = None,
        optional: bool = False,
        keep_graph: bool = False,
        to: str | torch.device | None = None,
    ) -> SavedTensor:
        """Keeps a copy of the value: see `Proxy.save`."""
        return _as(self, Proxy.save(self, name, optional, keep_graph, to))

    @property
    def grad(self) -> Any:
        """The gradient of the value: see `Proxy.grad`."""
        recording, form = self._recording, self._name.form
        if not recording.open or form is None:
            return _GRAD.__get__(self)
        line, start = mark(), len(recording.graph)
        gradient = Proxy(recording, read_gradient(recording, self._source, line))
        if isinstance(form, Computed):
            shown = form.gradient(gradient)
        else:
            shown = form.shown(gradient, self._invocation, line)
        recording.forget_contexts(start)
        return shown

    @grad.setter
    def grad(self, value: Any) -> None:
        recording, form = self._recording, self._name.form
        if not recording.open or form is None:
            _GRAD.__set__(self, value)
            return
        if isinstance(form, Computed):
            raise OperationError(
                f"The gradient of `{self.written()}` cannot be written: {form.unwritable}",
                here(),
            )
        line = mark()
        base = Proxy(recording, self._source)
        value = form.restored(value, base, self._invocation, line)
        write_gradient(recording, self._source, value, line)


class _Part(Proxy):
    """A value into which nothing is written in place: `x += y` makes a new one of it."""

    __slots__ = ()

    def save(
        self,
        name: str | None = None,
        optional: bool = False,
        keep_graph: bool = False,
        to: str | torch.device | None = None,
    ) -> SavedTensor:
        """Keeps a copy of the value: see `Proxy.save`."""
        return _as(self, Proxy.save(self, name, optional, keep_graph, to))


class _SavedAs(SavedProxy):
    """What `.save()` of a proxy of these gives: while the block is open it is what that one is."""

    _saved: Any

    @property
    def grad(self) -> Any:
        """The gradient of the value: see `Proxy.grad`."""
        return self._saved.grad

    @grad.setter
    def grad(self, value: Any) -> None:
        self._saved.grad = value

    def __getitem__(self, key: Any) -> Any:
        return self._saved[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._saved[key] = value


class _StepsAs(SavedSteps):
    """The same in every step."""

    _saved: Any
    grad = _SavedAs.grad  # pyright: ignore[reportIncompatibleMethodOverride]
    __getitem__ = cast(Any, _SavedAs.__getitem__)
    __setitem__ = cast(Any, _SavedAs.__setitem__)


def _as(source: Proxy, saved: Any) -> Any:
    """Returns what `.save()` gave, with the meaning that its source has while the block is open."""
    # Lines behind `.save()` may go on with what it gave, which has to mean the same as its source.
    if isinstance(saved, SavedProxy | SavedSteps):
        vars(saved)["_saved"] = source
        return become(saved, _SavedAs if isinstance(saved, SavedProxy) else _StepsAs)
    if isinstance(source, NamedProxy):
        saved._name, saved._source, saved._reading = source._name, source._source, source._reading
        saved._step = source._step
    return saved


class ComputedProxy(NamedProxy):
    """Stands for a value by a standard name that is computed, and is no part of the model.

    A value assigned to it, or to a part of it by an index, is put into the model as a whole.
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Proxy:
        part = Proxy.__getitem__(self, key)
        return _Part(part._recording, part._ref)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not self._recording.open:
            Proxy.__setitem__(self, key, value)
            return
        whole = self.clone()
        whole[key] = value
        invocation = self._invocation
        now, invocation.current_step = invocation.current_step, self._step
        try:
            self._name.write(invocation, whole, mark())
        finally:
            invocation.current_step = now


def _not_in_place(self: Proxy, other: Any) -> Any:
    return NotImplemented


def _as_source(operator: str) -> Any:
    def with_source(self: Any, other: Any) -> Any:
        return getattr(self._saved, operator)(other)

    return with_source


for _operator in AUGMENTED:
    setattr(_SavedAs, f"__i{_operator}__", _as_source(f"__i{_operator}__"))
    setattr(_Part, f"__i{_operator}__", _not_in_place)
    setattr(ComputedProxy, f"__i{_operator}__", _not_in_place)


_GRAD: Any = vars(AnyProxy)["grad"]
