"""What a forward makes of what: every call of a module and of a torch function in one run.

From this a model is understood without its source: which values are added to the residual stream,
what goes into a softmax, what a linear layer was given. `models/anatomy/` reads it.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from insitu.engine.functions import in_cache
from insitu.engine.interpose import Taps
from insitu.engine.keeping import evaluating
from insitu.engine.probe import Call, fake_run
from insitu.graph.changes import changing
from insitu.graph.ordinary import made_ordinary, ordinary_tensors
from insitu.graph.structure import map_structure, tensors_of

CASTS = frozenset(["bfloat16", "double", "float", "half", "to", "type", "type_as"])
"""Functions that bring a tensor to a dtype."""


class Event(NamedTuple):
    """A call of a module, or of a torch function in a module's own forward.

    Attributes:
        path: the module's path; of a function, that of the module whose forward calls it.
        function: the function's name, such as "softmax"; "" for a call of the module.
        call: which call of the module, or of the function by the module, from 0; -1 of a function
            that a cache calls, which is none of the module's own.
        inputs: the values among its arguments, in their order.
        outputs: the values that it returned.
        first: the event with which the call began; events of a module come when it returns.
    """

    path: str
    function: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int

    def is_within(self, path: str) -> bool:
        """Returns whether this happens in a module, or is a call of it."""
        return self.path == path or self.path.startswith(f"{path}.") or not path


class Returned(NamedTuple):
    """One way in which a module returned a value.

    Attributes:
        event: the module's call.
        item: where in its output the value is: indices and keys, none if it is the output.
    """

    event: int
    item: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """Stands for a tensor among the arguments of an event.

    Attributes:
        number: which value it was.
    """

    number: int


class Applied(NamedTuple):
    """What a function or a module was called with, so that it can be called again.

    Attributes:
        function: the torch function, None for a call of the module.
        args: its arguments, with a `Value` in the place of each tensor.
        kwargs: its keyword arguments, in the same form.
    """

    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(slots=True)
class Dataflow:
    """The events of one forward and the values that passed between them.

    A value is a tensor at one time: what writes into a tensor makes a new value of it.

    Attributes:
        events: in the order in which they were done.
        shapes: of each value.
        made: the event that made each value, None for what came from outside.
        returned: the modules that returned each value, innermost first.
        arguments: what each call of a module was given, by position and by keyword: the numbers
            of values in the place of tensors, None in that of all else.
        results: what each call of a module returned, in the same form.
        applied: what each event was called with; of a forward that was kept.
        tensors: what each value was; of a forward that was kept.
        casts: the events that only brought a value to 16 bits, or back from them.
    """

    events: list[Event] = field(default_factory=list[Event])
    shapes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    made: list[int | None] = field(default_factory=list[int | None])
    returned: dict[int, list[Returned]] = field(default_factory=dict[int, list[Returned]])
    arguments: dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]] = field(
        default_factory=dict[int, tuple[tuple[Any, ...], Mapping[str, Any]]]
    )
    results: dict[int, Any] = field(default_factory=dict[int, Any])
    applied: dict[int, Applied] = field(default_factory=dict[int, Applied])
    tensors: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    casts: set[int] = field(default_factory=set[int])

    def maker(self, value: int) -> Event | None:
        """Returns the event that made a value, None if it came from outside."""
        index = self.made[value]
        return None if index is None else self.events[index]

    def calls(self, path: str) -> Iterator[int]:
        """Yields the calls of a module, as indices of events."""
        for index, event in enumerate(self.events):
            if event.path == path and not event.function:
                yield index


class _Watch(TorchFunctionMode):
    def __init__(self, visit: Callable[..., Any], caches: Collection[str]) -> None:
        super().__init__()
        self.visit = visit
        self.caches = caches

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in ("get", "set", ""):  # properties
            return func(*args, **(kwargs or {}))
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        # Torch counts the writes into a tensor: so a write in place is seen whatever the function
        # is called.
        version = None if target is None else target._version
        result = func(*args, **(kwargs or {}))
        written = target is not None and target._version != version
        before = (target if written else None, version)
        self.visit(name, func, args, kwargs or {}, result, *before, not in_cache(self.caches))
        return result


class _Begun(NamedTuple):
    """A call of a module that has not returned.

    Attributes:
        path: the module's path.
        first: the event with which it began.
        given: its arguments, with a `Value` in the place of each tensor.
        inputs: the numbers of these.
    """

    path: str
    first: int
    given: tuple[tuple[Any, ...], Mapping[str, Any]]
    inputs: tuple[int, ...]


class _Recorder:
    """Writes down the dataflow of what runs.

    Args:
        keeping: whether the dataflow keeps the arguments of events and the tensors themselves.
    """

    def __init__(self, keeping: bool) -> None:
        self.flow = Dataflow()
        self._keeping = keeping
        # The value that a tensor was when last seen, and how often it had been written to then.
        self._current: dict[int, tuple[int, int]] = {}
        self._last_write: int | None = None
        self._kept: list[torch.Tensor] = []  # so that no identity is given twice
        self._counts: Counter[tuple[str, str]] = Counter()
        self._stack: list[_Begun] = []

    def _value(self, tensor: torch.Tensor) -> int:
        known = self._current.get(id(tensor))
        if known is None:
            return self._new(tensor, None)
        if known[1] != tensor._version:  # written to through another tensor over its memory
            return self._new(tensor, self._last_write)
        return known[0]

    def _new(self, tensor: torch.Tensor, made: int | None) -> int:
        flow = self.flow
        value = len(flow.shapes)
        flow.shapes.append(tuple(tensor.shape))
        flow.made.append(made)
        self._current[id(tensor)] = (value, tensor._version)
        self._kept.append(tensor)
        if self._keeping:
            flow.tensors[value] = tensor
        return value

    def _values(self, items: Any) -> tuple[Any, tuple[int, ...]]:
        """A structure with a `Value` in the place of each tensor, and the numbers of all."""
        found: list[int] = []

        def leaf(item: Any) -> Any:
            if not isinstance(item, torch.Tensor):
                return item
            found.append(self._value(item))
            return Value(found[-1])

        return map_structure(leaf, items), tuple(found)

    def visit(
        self,
        name: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        result: Any,
        written: torch.Tensor | None,
        version: int | None,
        counts: bool,
    ) -> None:
        path = self._stack[-1].path if self._stack else ""
        call = self._counts[path, name] if counts else -1
        self._counts[path, name] += counts
        index = len(self.flow.events)
        outputs: list[int] = []
        if written is None:
            given, inputs = self._values((args, kwargs))
        else:
            given, inputs = self._values_before(args, kwargs, written, version)
            outputs.append(self._new(written, index))
            self._last_write = index

        def leaf(item: Any) -> Any:
            if isinstance(item, torch.Tensor) and id(item) not in self._current:
                outputs.append(self._new(item, index))
            return item

        map_structure(leaf, result)
        if self._keeping:  # as they are now: they may be written to
            seen = (written, *tensors_of(result))
            for tensor in seen:
                if tensor is not None and (value := self._current[id(tensor)][0]) in outputs:
                    self.flow.tensors[value] = tensor.detach().clone()
        if outputs:
            self.flow.events.append(Event(path, name, call, inputs, tuple(outputs), index))
            if name in CASTS and _is_narrowed(args, result):
                self.flow.casts.add(index)
            if self._keeping:
                self.flow.applied[index] = Applied(function, *given)

    def _values_before(
        self, args: Any, kwargs: Any, written: torch.Tensor, version: int | None
    ) -> tuple[Any, tuple[int, ...]]:
        """Arguments and their values; one of them was written to meanwhile."""
        known = self._current.get(id(written))
        if known is None or known[1] != version:
            known = (self._new(written, None if known is None else self._last_write), -1)
        self._current[id(written)] = (known[0], written._version)
        return self._values((args, kwargs))

    def enter(self, path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes that a call of a module begins."""
        given, inputs = self._values((args, dict(kwargs)))
        self._stack.append(_Begun(path, len(self.flow.events), given, inputs))

    def leave(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Notes that a call of a module has ended."""
        flow = self.flow
        begun = self._stack.pop()
        call = self._counts[path, ""]
        self._counts[path, ""] += 1
        index = len(flow.events)
        returned, outputs = self._values(output)
        shown = _numbers(returned)
        flow.events.append(Event(path, "", call, begun.inputs, outputs, begun.first))
        flow.arguments[index] = _numbers(begun.given)
        if self._keeping:
            flow.applied[index] = Applied(None, *begun.given)
        flow.results[index] = shown
        for value, item in _items(shown):
            flow.returned.setdefault(value, []).append(Returned(index, item))


def watch(
    module: nn.Module,
    modules: Mapping[str, nn.Module],
    call: Call,
    fake: bool,
    keeping: bool = False,
    caches: Collection[str] = (),
    contents: bool = False,
) -> Dataflow:
    """Makes a call of a module and returns its dataflow: that without dropout, in either mode.

    Args:
        module: the module. It is changed for the duration, so the caller must hold it.
        modules: its tree, by path.
        call: what to call it with.
        fake: whether to run on tensors without data, which needs no weights.
        keeping: whether the dataflow keeps the arguments of events and the tensors themselves.
        caches: the Python modules of caches: what they call is not a forward's own.
        contents: whether on tensors without data integers in the call count too.
    """
    recorder = _Recorder(keeping)
    with ordinary_tensors():
        args, kwargs = made_ordinary(tuple(call))
        with changing() as changes:
            taps = Taps(changes)
            # A module with two names gets its first one: the dictionary keeps the last that it is
            # given.
            for part, path in {part: path for path, part in reversed([*modules.items()])}.items():
                taps.before(part, partial(recorder.enter, path))
                taps.after(part, partial(recorder.leave, path))
            changes.enter(evaluating(modules.values()))
            changes.enter(_Watch(recorder.visit, caches))
            if fake:
                fake_run(module, call, contents)
            else:
                changes.gradients(False)
                module(*args, **kwargs)
    return recorder.flow


def _is_narrowed(args: Any, result: Any) -> bool:
    """Whether a call made a floating-point tensor of 16 bits of another one, or the reverse."""
    given = next((one for one in args if isinstance(one, torch.Tensor)), None)
    if given is None or not isinstance(result, torch.Tensor):
        return False
    kinds = (given.dtype, result.dtype)
    floating = all(kind.is_floating_point for kind in kinds)
    return floating and kinds[0] != kinds[1] and 2 in (kind.itemsize for kind in kinds)


def _numbers(items: Any) -> Any:
    """A structure with the numbers of values, and None in the place of all else."""
    return map_structure(lambda item: item.number if type(item) is Value else None, items)


def _items(
    shown: Any, at: tuple[int | str, ...] = ()
) -> Iterator[tuple[int, tuple[int | str, ...]]]:
    """The values of a structure and where they are; the first place of each."""
    if type(shown) is int:
        yield shown, at
    elif isinstance(shown, Mapping):
        for key, item in cast("Mapping[str, Any]", shown).items():
            yield from _items(item, (*at, key))
    elif isinstance(shown, tuple | list):
        for key, item in enumerate(cast("Sequence[Any]", shown)):
            yield from _items(item, (*at, key))
