"""Programs with backward passes, and what their gradients must be: differences of plain runs.

The gradient of a value tells what a write would change. So the oracle adds a little to the value,
where it was last written before the line of the `.grad`, and sees in plain hooks (`oracle.py`) by
how much the loss changes. It knows nothing of autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from insitu import Model
from tests.fidelity.oracle import expected
from tests.fidelity.programs import (
    Augment,
    Change,
    Compute,
    Line,
    Program,
    Read,
    Replace,
    Save,
    Site,
    Subject,
    View,
    record,
)

STEP = 1e-5


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward pass from a weighted sum of values of all invocations."""

    invocation: int
    name: str
    operands: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    def source(self) -> str:
        return f"{self.name} = loss({', '.join(self.operands)}).backward(retain_graph=True)"


@dataclass(frozen=True, slots=True)
class Grad:
    """Reads the gradient of a value, of a backward pass that it names or of none."""

    invocation: int
    operands: tuple[str]
    of: str | None

    def source(self) -> str:
        value = f"{self.operands[0]}.grad.save()"
        return value if self.of is None else f"with {self.of}: {value}"


def direction(shape: torch.Size, phase: float = 0) -> torch.Tensor:
    """A tensor of numbers of either sign and of about one size."""
    return torch.cos(torch.arange(shape.numel()).double() * 1.7 + phase).reshape(shape)


def pass_of(lines: Sequence[Any], at: int) -> str:
    """The backward pass that the gradient in a line belongs to."""
    if lines[at].of is not None:
        return lines[at].of
    before = [line.name for line in lines[:at] if isinstance(line, Backward)]
    after = [line.name for line in lines[at:] if isinstance(line, Backward)]
    return before[-1] if before else after[0]


def slope(subject: Subject, program: Program, at: int) -> float:
    """The derivative of a loss in the direction in which a value is moved.

    Args:
        subject: the model.
        program: the program, with backward passes and gradients.
        at: which of its lines reads the gradient.
    """
    lines: list[Any] = list(program.lines)
    wanted = pass_of(lines, at)
    ends = [loss_of(subject, program, wanted, moved(lines, at, sign * STEP)) for sign in (1, -1)]
    return (ends[0] - ends[1]) / (2 * STEP)


def loss_of(subject: Subject, program: Program, name: str, lines: Sequence[Any]) -> float:
    """What a loss is in plain PyTorch."""
    plain: list[Line] = []
    shapes: tuple[torch.Size, ...] = ()
    for line in lines:
        if isinstance(line, Backward) and line.name == name:
            plain += [Save(line.invocation, (operand,)) for operand in line.operands]
            shapes = line.shapes
        elif not isinstance(line, Backward | Grad | Save):
            plain.append(line)
    saved = expected(subject, Program(program.prompts, tuple(plain)))
    return sum(
        float((value * direction(shape)).sum()) for value, shape in zip(saved, shapes, strict=True)
    )


def moved(lines: Sequence[Any], at: int, by: float) -> list[Any]:
    """The lines, with one that adds to the value whose gradient is read, where it was made."""
    name = lines[at].operands[0]
    homes: dict[str, Any] = {}  # the memory of the values
    whole: dict[Any, tuple[int, str]] = {}  # a value that is all of some memory, and whose it is
    standing: dict[Site, Any] = {}
    made: dict[Any, int] = {}  # the line that last wrote some memory
    for number, line in enumerate(lines[:at]):
        match line:
            case Read():
                memory = homes[line.name] = standing.setdefault(line.site, line.site)
                made.setdefault(memory, number)
                whole.setdefault(memory, (line.site.invocation, line.name))
            case Compute():
                homes[line.name] = number
                made[number], whole[number] = number, (line.invocation, line.name)
            case View():
                homes[line.name] = homes[line.operands[0]]
            case Change():
                made[homes[line.operands[0]]] = number
            case Augment():
                made[standing.setdefault(line.site, line.site)] = number
            case Replace():
                given = line.operands[0]
                is_whole = any(known == given for _, known in whole.values())
                if not (is_whole and homes[given] == standing.get(line.site)):
                    standing[line.site] = number
                    made[number] = number
            case _:
                pass
    memory = homes[name]
    after = made[memory] + 1
    operation = f"{{}}.add_({_DIRECTION}, alpha={by!r})"
    site = next((site for site, own in standing.items() if own == memory), None)
    if site is not None:
        read = Read(site.invocation, "moved", site)
        return [
            *lines[:after],
            read,
            Change(site.invocation, operation, ("moved",)),
            *lines[after:],
        ]
    invocation, own = whole[memory]
    return [*lines[:after], Change(invocation, operation, (own,)), *lines[after:]]


# `direction`, of what a line writes into, which is `a` there.
_DIRECTION = "torch.cos(torch.arange(a.numel()).double() * 1.7 + 1).reshape(a.shape)"


def along(grad: torch.Tensor) -> float:
    """A gradient in the direction in which `moved` moves."""
    return float((grad * direction(grad.shape, 1)).sum())


def replay_gradients(subject: Subject, program: Program) -> list[torch.Tensor]:
    """Runs a program with Insitu and returns the gradients that it reads, in their order."""
    model, kept = subject.model, []
    with model.trace() as tracer:
        invocations = [tracer.invoke(subject.prompts[prompt]) for prompt in program.prompts]
        values: dict[str, Any] = {}
        passes: dict[str, Any] = {}
        for line in program.lines:
            with invocations[line.invocation]:
                kept.extend(_recorded(line, model, values, passes))
    return [grad.value for grad in kept]


def _recorded(
    line: Any, model: Model, values: dict[str, Any], passes: dict[str, Any]
) -> Iterator[Any]:
    """Writes a line; yields the gradient that it reads."""
    match line:
        case Backward():
            terms = [
                (values[name] * direction(shape)).sum()
                for name, shape in zip(line.operands, line.shapes, strict=True)
            ]
            passes[line.name] = sum(terms[1:], terms[0]).backward(retain_graph=True)
        case Grad():
            value = values[line.operands[0]]
            if line.of is None:
                yield value.grad.save()
            else:
                with passes[line.of]:
                    yield value.grad.save()
        case _:
            for _ in record(line, model, values):
                pass
