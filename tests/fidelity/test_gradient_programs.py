"""Random programs with backward passes, against differences of plain runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, note, reject
from hypothesis import strategies as st
from torch import nn

from insitu import InsituError, LanguageModel, Model
from tests.conftest import tiny_gpt2
from tests.fidelity.differentiated import (
    Backward,
    Grad,
    along,
    pass_of,
    replay_gradients,
    slope,
)
from tests.fidelity.oracle import SilentError, TooLateError
from tests.fidelity.programs import Compute, Place, Program, Read, Site, Subject, View
from tests.fidelity.test_programs import Pair, Writer, drawn, examples
from tests.thinning import sampled

SHARDS = 4
# Of each shard and model.
EACH = -(-int(os.environ.get("INSITU_GRADIENT_PROGRAMS", "80")) // (2 * SHARDS))
# What torch itself refuses, or what no derivative can be told of.
REFUSED = ("modified by an inplace operation", "the same memory by another name")


class Smooth(nn.Module):
    """Writes in place, hands on what it was given, and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = nn.Identity()
        self.pair = Pair()
        self.shared = nn.Linear(4, 4)
        self.bent = nn.SiLU(inplace=True)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(self.first(x))
        left, right = self.pair(self.shared(x))
        x = x.sin()
        x += left
        right = self.bent(self.shared(x)) + self.same(right)
        return self.last(right * x)


@cache
def smooth() -> Subject:
    torch.manual_seed(0)
    module = Smooth().double()
    calls = {"same": 2, "shared": 2}
    places = [
        (Place(path, kind, call), part)
        for path in ("first", "same", "pair", "shared", "bent", "last")
        for call in range(calls.get(path, 1))
        for kind in ("input", "output")
        for part in ((0, 1) if (path, kind) == ("pair", "output") else (None,))
    ]
    places += [(Place("", "output"), None)]
    prompts = [torch.randn(2, 4, 4).double() for _ in range(2)]
    return Subject(
        Model(module), deepcopy(module), prompts, lambda x: {"x": x}, places, together=False
    )


@cache
def language() -> Subject:
    module = tiny_gpt2().double()
    inside = ["ln_1.input", "mlp.input", "attn.c_proj.output", "mlp.act.output", "ln_2.output"]
    places: list[tuple[Place, int | None]] = []
    for block in range(3):
        path = f"transformer.h.{block}"
        places += [(Place(path, "input"), None), (Place(path, "output"), 0)]
        for site in inside:
            name, _, kind = site.rpartition(".")
            places.append((Place(f"{path}.{name}", kind), None))
    places += [(Place("transformer.ln_f", "input"), None), (Place("lm_head", "output"), None)]
    prompts = [torch.randint(100, (1, length)) for length in (4, 3)]
    return Subject(
        *(LanguageModel(module), deepcopy(module), prompts),
        lambda ids: {"input_ids": ids, "use_cache": False},
        places,
        together=False,
    )


COMPUTED = ["{} + {}", "{} - {}", "{} * 0.5", "1 - {}", "torch.sin({})", "torch.tanh({} * {})"]
COPIED = ["{}.clone()", "{}[:, [1, 0]]", "{} + 0"]
CHANGED = ["{}[:, 0] = 0.5", "{}[:, -1] -= 1", "{} += {}", "{}.mul_(0.5)", "{}.sin_()"]
CHANGED += ["{}.copy_({})", "{}[..., 1:] = {}[..., 1:] * 2", "{}[:, [0, 1]] = 1", "{} -= 1"]
CHANGED += ["{}.mT[..., 0] = 2", "{}[..., 0].add_({}[..., -1])", "{}[:1] *= {}[:1].sin()"]


class Differentiating(Writer):
    """Draws the lines of a program, and passes and gradients among them."""

    COMPUTED, COPIED, CHANGED = COMPUTED, COPIED, CHANGED

    def differentiated(self) -> Program:
        lines = list(self.program().lines)
        backwards = self.draw(st.integers(1, 2))
        start = len(self.prompts)
        whole = [line.name for line in lines if isinstance(line, Read | Compute)]
        for number in range(backwards):
            at = self.draw(st.integers(start, len(lines)))
            names = [line.name for line in lines[:at] if isinstance(line, Read | Compute | View)]
            chosen = [f"v{own}" for own in range(len(self.prompts))]
            chosen += self.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2))
            operands = tuple(dict.fromkeys(chosen))
            shapes = tuple(self.values[name].shape for name in operands)
            line: Any = Backward(self.invocation(), f"pass_{number}", operands, shapes)
            lines.insert(at, line)
        for _ in range(self.draw(st.integers(1, 4))):
            name = self.draw(st.sampled_from(whole))
            made = next(at for at, line in enumerate(lines) if getattr(line, "name", "") == name)
            at = self.draw(st.integers(made + 1, len(lines)))
            before = [line.name for line in lines[:at] if isinstance(line, Backward)]
            of = self.draw(st.sampled_from([None, *before]))
            lines.insert(at, Grad(self.invocation(), (name,), of))
        # A pass of which nothing is wanted is refused.
        lines += [Grad(0, ("v0",), f"pass_{number}") for number in range(backwards)]
        return Program(tuple(self.prompts), tuple(lines))

    def program(self) -> Program:
        """A program in which each invocation begins with a read of what it ends in."""
        place, part = self.subject.places[-1]
        for number in range(len(self.prompts)):
            self.read(number, Site(number, place, part))
        return super().program()


@st.composite
def programs(draw: Callable[..., Any], subject: Subject) -> Program:
    return Differentiating(draw, subject).differentiated()


SEEN: Counter[str] = Counter()


def check(subject: Subject, program: Program, frozen: bool) -> None:
    """Compares the gradients of a program with the oracle."""
    examples(subject)
    at = [number for number, line in enumerate(program.lines) if isinstance(line, Grad)]
    try:
        slopes = {number: slope(subject, program, number) for number in at}
    except (SilentError, TooLateError):
        reject()
    slopes = {number: value for number, value in slopes.items() if value != 0}
    passes = {line.name for line in program.lines if isinstance(line, Backward)}
    assume(passes == {pass_of(program.lines, number) for number in slopes})
    kept = [
        line
        for number, line in enumerate(program.lines)
        if not isinstance(line, Grad) or number in slopes
    ]
    program = Program(program.prompts, tuple(kept))
    note(f"{program!r}")
    subject.model.module.requires_grad_(not frozen)
    for time in ("at first", "with the plan of the first time"):
        try:
            grads = replay_gradients(subject, program)
        except InsituError as error:
            assert any(said in str(error) for said in REFUSED), error
            SEEN["refused"] += 1
            return
        for grad, right in zip(grads, slopes.values(), strict=True):
            found = along(grad)
            assert found == pytest.approx(right, rel=1e-4, abs=1e-5), time
    assert all(parameter.grad is None for parameter in subject.model.module.parameters())
    SEEN["right"] += 1


@pytest.mark.parametrize("make", sampled([smooth, language], [smooth]))
@pytest.mark.parametrize("shard", sampled(range(SHARDS), [3]))
def test_gradients_tell_what_a_write_would_change(shard: int, make: Callable[[], Subject]) -> None:
    subject = make()

    @drawn(shard, EACH)
    @given(programs(subject), st.booleans())
    def agree(program: Program, frozen: bool) -> None:
        check(subject, program, frozen)

    agree()
    assert SEEN["right"] > 5 * SEEN["refused"]
