"""Experiments as plain data: lists of lines that can be printed, replayed and interpreted.

A program is what a user might write in the invocations of one block. Here it is printed as Python
and replayed through the public interface; `oracle.py` says what it must give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from insitu import Model


@dataclass(frozen=True, slots=True)
class Place:
    """A module's input or output, at one of its calls."""

    path: str
    kind: str
    call: int = 0

    def source(self) -> str:
        names = "".join(f"[{name}]" if name.isdigit() else f".{name}" for name in self._names())
        call = f".call({self.call})" if self.call else ""
        return f"model{names}{call}.{self.kind}"

    def holder(self, model: Model) -> Any:
        """The handle, or the call of one, that has this place as an attribute."""
        handle: Any = model
        for name in self._names():
            handle = handle[name]
        return handle.call(self.call) if self.call else handle

    def _names(self) -> list[str]:
        return self.path.split(".") if self.path else []


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor that passes a place in an invocation: all that passes, or a part of a tuple."""

    invocation: int
    place: Place
    part: int | None = None

    def source(self) -> str:
        return self.place.source() + ("" if self.part is None else f"[{self.part}]")

    def read(self, model: Model) -> Any:
        whole = getattr(self.place.holder(model), self.place.kind)
        return whole if self.part is None else whole[self.part]

    def write(self, model: Model, value: Any) -> None:
        holder = self.place.holder(model)
        if self.part is None:
            setattr(holder, self.place.kind, value)
        else:
            getattr(holder, self.place.kind)[self.part] = value


@dataclass(frozen=True, slots=True)
class Read:
    invocation: int
    name: str
    site: Site

    def source(self) -> str:
        return f"{self.name} = {self.site.source()}"


@dataclass(frozen=True, slots=True)
class Compute:
    """Makes a value with memory of its own."""

    invocation: int
    name: str
    operation: str
    operands: tuple[str, ...]

    def source(self) -> str:
        return f"{self.name} = {self.operation.format(*self.operands)}"


@dataclass(frozen=True, slots=True)
class View:
    """Makes a value that shares the memory of another."""

    invocation: int
    name: str
    operation: str
    operands: tuple[str]

    def source(self) -> str:
        return f"{self.name} = {self.operation.format(*self.operands)}"


@dataclass(frozen=True, slots=True)
class Change:
    """Writes in place into the first of its operands."""

    invocation: int
    operation: str
    operands: tuple[str, ...]

    def source(self) -> str:
        return self.operation.format(*self.operands)


@dataclass(frozen=True, slots=True)
class Augment:
    """Writes in place into what stands at a site, as `site += value` does."""

    invocation: int
    site: Site
    operation: str
    operands: tuple[str, ...]

    def source(self) -> str:
        return self.operation.format(self.site.source(), *self.operands)


@dataclass(frozen=True, slots=True)
class Replace:
    """Assigns a value to a site."""

    invocation: int
    site: Site
    operands: tuple[str]

    def source(self) -> str:
        return f"{self.site.source()} = {self.operands[0]}"


@dataclass(frozen=True, slots=True)
class Save:
    invocation: int
    operands: tuple[str]

    def source(self) -> str:
        return f"{self.operands[0]}.save()"


Line = Read | Compute | View | Change | Augment | Replace | Save


@dataclass(frozen=True, slots=True)
class Program:
    """Lines, and which prompt each invocation gets."""

    prompts: tuple[int, ...]
    lines: tuple[Line, ...]

    def __repr__(self) -> str:
        text = ["", "with model.trace() as tracer:"]
        for number, prompt in enumerate(self.prompts):
            text.append(f"    invocation_{number} = tracer.invoke(prompts[{prompt}])")
        before = None
        for line in self.lines:
            if line.invocation != before:
                text.append(f"    with invocation_{line.invocation}:")
            text.append(f"        {line.source()}")
            before = line.invocation
        return "\n".join(text)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Lets hypothesis print the same."""
        printer.text(repr(self))


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model that programs are about.

    Attributes:
        model: the model as Insitu has it.
        copy: the same for plain PyTorch hooks.
        prompts: what invocations may be given.
        arguments: the keyword arguments of a plain call for a prompt.
        places: the places that programs use, each with its part if a tuple passes there.
        together: whether the invocations of a block run as one batch.
    """

    model: Model
    copy: nn.Module
    prompts: Sequence[torch.Tensor]
    arguments: Callable[[torch.Tensor], dict[str, Any]]
    places: Sequence[tuple[Place, int | None]]
    together: bool


@cache
def function_of(operation: str) -> Callable[..., Any]:
    """An operation as a function: of its operands, it returns its result, or what it changed."""
    names = ("a", "b")[: operation.count("{}")]
    text = operation.format(*names)
    body = f"    {text}\n    return a" if is_change(operation) else f"    return {text}"
    namespace: dict[str, Any] = {"torch": torch}
    exec(f"def function({', '.join(names)}):\n{body}", namespace)
    return namespace["function"]


def is_change(operation: str) -> bool:
    """Whether an operation writes in place."""
    return bool(re.search(r"_\(| [-+*]?= ", operation))


def replay(subject: Subject, program: Program, **options: Any) -> list[torch.Tensor]:
    """Runs a program with Insitu and returns what it saves, in the order of the lines."""
    model, saved = subject.model, []
    with model.trace(**options) as tracer:
        invocations = [tracer.invoke(subject.prompts[prompt]) for prompt in program.prompts]
        values: dict[str, Any] = {}
        for line in program.lines:
            with invocations[line.invocation]:
                saved.extend(record(line, model, values))
    return [value.value for value in saved]


def record(line: Line, model: Model, values: dict[str, Any]) -> Iterator[Any]:
    """Writes a line; yields what it saves."""
    operands = () if isinstance(line, Read) else [values[name] for name in line.operands]
    match line:
        case Read():
            values[line.name] = line.site.read(model)
        case Compute() | View():
            values[line.name] = function_of(line.operation)(*operands)
        case Change():
            values[line.operands[0]] = function_of(line.operation)(*operands)
        case Augment():
            changed = function_of(line.operation)(line.site.read(model), *operands)
            line.site.write(model, changed)
        case Replace():
            line.site.write(model, operands[0])
        case Save():
            yield operands[0].save()
