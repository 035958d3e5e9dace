"""Ways: what a model makes of a value on its way to a later one, to be made of other values too.

What stands between the last block and the logits differs from model to model: a norm and the
unembedding, and with them a projection, a scale or a soft cap. It is found in the dataflow of one
small forward as calls of modules and of torch functions, and verified on the values of that
forward. Ways are for operations on each position alone; where positions mix there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from insitu.engine.dataflow import CASTS, Applied, Dataflow, Value
from insitu.engine.fallback import Fallback, tried
from insitu.graph.structure import map_structure
from insitu.models.anatomy.reading import RESHAPES

Call = Callable[[str, tuple[Any, ...], Mapping[str, Any]], Any]
"""Calls a module, given its path and its arguments."""

_CHOICES = frozenset(["getitem", "index_select", "narrow", "select"])


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a way.

    Attributes:
        takes: the value that it is made of.
        makes: the value that it makes.
        path: the module that is called; None for a function.
        applied: what it is called with; None if numbers stay as they are.
        item: where the value is in the result of the call.
        dtype: the dtype that it is brought to; None if it is left.
    """

    takes: int
    makes: int
    path: str | None = None
    applied: Applied | None = None
    item: tuple[int | str, ...] = ()
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """What a model makes of a value on its way to a later one.

    Attributes:
        start: the value at its beginning.
        end: the value at its end.
        steps: its operations, in order.
        constants: the model's own tensors that have a part in it.
    """

    start: int
    end: int
    steps: Sequence[Step]
    constants: Mapping[int, torch.Tensor]

    @property
    def modules(self) -> list[str]:
        """The paths of the modules on it."""
        return [step.path for step in self.steps if step.path is not None]

    @property
    def outline(self) -> list[tuple[Any, ...]]:
        """The modules and functions of its steps, in order, without arguments."""
        return [
            (
                step.path,
                None if step.applied is None or step.path else step.applied.function,
                step.item,
                step.dtype is None,
            )
            for step in self.steps
        ]

    def apply(self, value: Any, call: Call) -> Any:
        """Returns what the model would make of a value.

        Args:
            value: `(..., size)`, a tensor or a proxy.
            call: how modules are called.
        """
        values: dict[int, Any] = {self.start: value}

        def leaf(item: Any) -> Any:
            if not isinstance(item, Value):
                return item
            found = values.get(item.number)
            return self.constants[item.number] if found is None else found

        for step in self.steps:
            made = values[step.takes]
            if step.applied is not None:
                args, kwargs = map_structure(leaf, (step.applied.args, dict(step.applied.kwargs)))
                if step.path is not None:
                    made = call(step.path, args, kwargs)
                else:
                    made = _called(step.applied.function, args, kwargs)
                for at in step.item:
                    made = made[at]
            elif step.dtype is not None:
                made = made.to(step.dtype)
            values[step.makes] = made
        return values[self.end]


def find_way(
    flow: Dataflow,
    modules: Mapping[str, nn.Module],
    start: int,
    end: int,
    is_unit: Callable[[str], bool],
    verified: bool = True,
) -> Way | str:
    """Returns the way from one value of a forward to another, or why there is none.

    Args:
        flow: the dataflow of the forward, kept.
        modules: the model's tree, by path.
        start: the value at its beginning.
        end: the value at its end.
        is_unit: whether a module, by its path, is called as a whole; of others, the functions in
            their forward are.
        verified: whether the values of the forward have to bear it out; they have to be there.
    """
    search = _Search(flow, modules, start, is_unit)
    steps: dict[int, Step] = {start: Step(start, start)}
    waiting = [end]
    while waiting:
        value = waiting.pop()
        if value in steps:
            continue
        step = search.step(value)
        if isinstance(step, str):
            return step
        steps[value] = step
        taken = [step.takes] if step.applied is None else list(_values(step.applied))
        waiting.extend(one for one in taken if one in search.reached)
    del steps[start]
    ordered = [steps[value] for value in sorted(steps)]  # values are numbered as they are made
    way = Way(start, end, ordered, search.constants)
    right = not verified or _is_right(way, flow, modules)
    return way if right else "what stands between them is not understood."


class _Search:
    """Finds how values are made that come from another one."""

    def __init__(
        self,
        flow: Dataflow,
        modules: Mapping[str, nn.Module],
        start: int,
        is_unit: Callable[[str], bool],
    ) -> None:
        self.flow = flow
        self.is_unit = is_unit
        self.constants: dict[int, torch.Tensor] = {}
        self.reached = {start}
        for event in flow.events:
            if not self.reached.isdisjoint(event.inputs):
                self.reached.update(event.outputs)
        own = (part for module in modules.values() for part in _own(module))
        self._own = {id(part) for part in own}

    def step(self, value: int) -> Step | str:
        """How a value was made, or why that is not known."""
        flow = self.flow
        if value not in self.reached:
            return "there is no way from one to the other."
        found = self._call(value)
        index, item, path = found if found is not None else (flow.made[value], (), None)
        if index is None:
            return "it is not known how they come from each other."
        event, applied = flow.events[index], flow.applied[index]
        if found is None and len(event.outputs) > 1:
            item = (event.outputs.index(value),)
        taken = [one for one in event.inputs if one in self.reached]
        if found is None and len(taken) == 1:
            simple = self._simple(event.function, taken[0], value)
            if simple is not None:
                return simple
        for other in {*event.inputs} - self.reached:
            if not self._is_constant(other):
                return f"{event.path or 'the model'} adds something of the prompt to it."
            self.constants[other] = flow.tensors[other].detach()
        return Step(taken[0], value, path, applied, item)

    def _call(self, value: int) -> tuple[int, tuple[int | str, ...], str] | None:
        """The call of the outermost unit that made a value."""
        for returned in reversed(self.flow.returned.get(value, ())):
            event = self.flow.events[returned.event]
            made = value not in event.inputs and not self.reached.isdisjoint(event.inputs)
            if made and self.is_unit(event.path):
                return returned.event, returned.item, event.path
        return None

    def _simple(self, function: str, taken: int, value: int) -> Step | str | None:
        """The step of a function that leaves numbers as they are, None if it does not."""
        flow = self.flow
        before, after = flow.shapes[taken], flow.shapes[value]
        if function in CASTS:
            return Step(taken, value, dtype=flow.tensors[value].dtype)
        if function in _CHOICES and before != after:
            return "only a part of one is in the other."
        whole = before[-1:] == after[-1:] and _count(before) == _count(after)
        if function == "dropout" and not isinstance(flow.tensors[value], FakeTensor):
            whole = whole and torch.equal(flow.tensors[taken], flow.tensors[value])
        if function in (*RESHAPES, *_CHOICES) and whole:
            return Step(taken, value)
        return None

    def _is_constant(self, value: int) -> bool:
        """Whether a value is made of the model's own tensors and of nothing else."""
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            now = waiting.pop()
            if now in seen:
                continue
            seen.add(now)
            maker = self.flow.maker(now)
            if maker is not None:
                waiting.extend(maker.inputs)
            elif id(self.flow.tensors[now]) not in self._own:
                return False
        return True


def _is_right(way: Way, flow: Dataflow, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a way makes, of the value at its beginning, the one at its end; by its last axis."""
    given, expected = flow.tensors[way.start], flow.tensors[way.end]

    def applied() -> torch.Tensor:
        with torch.no_grad():
            return way.apply(given.flatten(0, -2)[:, None], partial(called, modules))

    made = tried(applied, "another number of positions")
    if isinstance(made, Fallback):
        return False
    expected = expected.flatten(0, -2)[:, None]
    if made.shape != expected.shape or made.dtype != expected.dtype:
        return False
    size = float(expected.double().abs().max())
    limit = 16 * torch.finfo(expected.dtype).eps * max(size, 1e-6)
    return float((made.double() - expected.double()).abs().max()) <= limit


def called(
    modules: Mapping[str, nn.Module], path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Calls a module on tensors.

    Args:
        modules: the model's tree, by path.
        path: the module's path.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    return modules[path](*args, **kwargs)


def _called(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Calls a torch function, also where the first argument of a tensor's method is a proxy."""
    name = getattr(function, "__name__", "")
    if getattr(torch.Tensor, name, None) is function:
        return getattr(args[0], name)(*args[1:], **kwargs)
    return function(*args, **kwargs)


def _values(applied: Applied) -> Iterator[int]:
    """The values among the arguments of a call."""
    found: list[int] = []

    def leaf(item: Any) -> Any:
        if isinstance(item, Value):
            found.append(item.number)
        return item

    map_structure(leaf, (applied.args, applied.kwargs))
    return iter(found)


def _own(module: nn.Module) -> Collection[torch.Tensor]:
    return (*module.parameters(recurse=False), *module.buffers(recurse=False))


def _count(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
