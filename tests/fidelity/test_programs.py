"""Random programs against the oracle: what they save, what is refused, and in which order."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, seed, settings
from hypothesis import strategies as st
from torch import nn

from insitu import CausalityError, LanguageModel, Model
from tests.conftest import tiny_gpt2
from tests.fidelity.oracle import SilentError, TooLateError, expected, forward, part_of, touched
from tests.fidelity.programs import (
    Augment,
    Change,
    Compute,
    Line,
    Place,
    Program,
    Read,
    Replace,
    Save,
    Site,
    Subject,
    View,
    function_of,
    replay,
)
from tests.thinning import sampled

SHARDS = 8
FIRST = int(os.environ.get("INSITU_SEED", "0"))  # other programs, where one wants others
# Of each shard and model; `make fuzz` asks for more.
EACH = -(-int(os.environ.get("INSITU_PROGRAMS", "640")) // (2 * SHARDS))


class Pair(nn.Module):
    """Returns two tensors, the second of which is what it was given."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x


class Tower(nn.Module):
    """Does what is hard to follow: aliases, parts, later calls, and writes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.same = nn.Identity()
        self.pair = Pair()
        self.shared = nn.Linear(4, 4)
        self.dropped = nn.Dropout()
        self.rectified = nn.ReLU(inplace=True)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.same(self.first(x))
        left, right = self.pair(self.shared(x))
        x += self.dropped(left)
        right = self.rectified(self.shared(x)) + self.same(right)
        return self.last(self.dropped(right))


@cache
def tower() -> Subject:
    torch.manual_seed(0)
    module = Tower().eval()
    inside = ["first", "same", "pair", "shared", "dropped", "rectified", "last"]
    calls = {"same": 2, "shared": 2, "dropped": 2}
    places = [
        (Place(path, kind, call), part)
        for path in inside
        for call in range(calls.get(path, 1))
        for kind in ("input", "output")
        for part in ((0, 1) if (path, kind) == ("pair", "output") else (None,))
    ]
    places += [(Place("", "input"), None), (Place("", "output"), None)]
    prompts = [torch.randn(2, 4, 4) for _ in range(2)]
    return Subject(
        Model(module), deepcopy(module), prompts, lambda x: {"x": x}, places, together=False
    )


@cache
def language() -> Subject:
    module = tiny_gpt2().double()  # so that a batch rounds far below the tolerance
    inside = ["ln_1.input", "mlp.input", "attn.c_proj.output", "mlp.c_proj.output"]
    inside += ["mlp.dropout.output", "mlp.output", "mlp.act.output", "ln_2.output"]
    places: list[tuple[Place, int | None]] = []
    for block in range(4):
        path = f"transformer.h.{block}"
        places += [(Place(path, "input"), None), (Place(path, "output"), 0)]
        for site in inside:
            name, _, kind = site.rpartition(".")
            places.append((Place(f"{path}.{name}", kind), None))
    places += [(Place("transformer.drop", "output"), None), (Place("lm_head", "output"), None)]
    prompts = [torch.randint(100, (1, length)) for length in (4, 4, 3)]
    prompts.append(torch.randint(100, (2, 3)))
    return Subject(
        *(LanguageModel(module), deepcopy(module), prompts),
        lambda ids: {"input_ids": ids, "use_cache": False},
        places,
        together=True,
    )


@cache
def examples(subject: Subject) -> dict[tuple[int, Place, int | None], torch.Tensor]:
    """What passes the places of a model, for each prompt."""
    found: dict[tuple[int, Place, int | None], torch.Tensor] = {}
    for prompt in range(len(subject.prompts)):

        def at(place: Place, value: Any, prompt: int = prompt) -> Any:
            for other, part in subject.places:
                if other == place:
                    found[prompt, place, part] = part_of(value, part).clone()
            return value

        forward(subject, prompt, {place for place, _ in subject.places}, at)
    return found


# Exact in any order and layout, so that bits can be compared; sums grow slowly.
COMPUTED = ["{} + {}", "{} - {}", "{} * 0.5", "1 - {}", "torch.relu({})", "torch.maximum({}, {})"]
COPIED = ["{}.clone()", "{}[:, [1, 0]]", "{} + 0"]
VIEWED = ["{}[:, 1:3]", "{}.mT", "{}[..., :2]", "{}[:1]", "{}.view(-1)", "{}.flatten(0, 1)"]
VIEWED += ["{}.unflatten(-1, (2, -1))", "{}[None]", "{}.reshape(-1, 4)"]
CHANGED = ["{}[:, 0] = 0.5", "{}[:, -1] -= 1", "{} += {}", "{}.mul_(0.5)", "{}.zero_()"]
CHANGED += ["{}.copy_({})", "{}[..., 1:] = {}[..., 1:]", "{}[:, [0, 1]] = 1", "{} -= 1"]
CHANGED += ["{}.mT[..., 0] = 2", "{}.clamp_(min=0)", "{}[..., 0].add_({}[..., -1])"]
AUGMENTED = ["{} += {}", "{} *= 0.5", "{} -= {}"]
KINDS = (
    [Read] * 4
    + [Compute] * 3
    + [View] * 2
    + [Change] * 4
    + [Augment, Replace, Replace]
    + [Save] * 3
)


class Writer:
    """Draws the lines of a program, each of which works on what is there."""

    COMPUTED, COPIED, CHANGED = COMPUTED, COPIED, CHANGED

    def __init__(self, draw: Callable[..., Any], subject: Subject) -> None:
        self.draw, self.subject = draw, subject
        prompts = st.integers(0, len(subject.prompts) - 1)
        self.prompts = draw(st.lists(prompts, min_size=1, max_size=3))
        self.lines: list[Line] = []
        self.values: dict[str, torch.Tensor] = {}  # an example of each

    def program(self) -> Program:
        for kind in self.draw(st.lists(st.sampled_from(KINDS), min_size=2, max_size=14)):
            self.write(kind if self.values else Read, self.invocation())
        ends = self.draw(st.booleans())
        for number in range(len(self.prompts) if ends else 0):
            place, part = self.subject.places[-1]
            self.read(number, Site(number, place, part))
            self.lines.append(Save(number, (list(self.values)[-1],)))
        if self.draw(st.booleans()):
            last = len(self.prompts) - 1
            self.lines += [Save(last, (name,)) for name in self.values]
        return Program(tuple(self.prompts), tuple(self.lines))

    def invocation(self) -> int:
        return self.draw(st.integers(0, len(self.prompts) - 1))

    def write(self, kind: type[Line], invocation: int) -> None:
        if kind is Read:
            self.read(invocation, self.site(invocation))
        elif kind is Compute:
            self.make(Compute, invocation, self.COMPUTED + self.COPIED)
        elif kind is View:
            self.make(View, invocation, VIEWED)
        elif kind is Change:
            self.change(invocation)
        elif kind is Augment:
            self.augment(invocation)
        elif kind is Replace:
            self.replace(invocation)
        else:
            self.lines.append(Save(invocation, (self.value(),)))

    def site(self, invocation: int) -> Site:
        return Site(invocation, *self.draw(st.sampled_from(self.subject.places)))

    def example(self, site: Site) -> torch.Tensor:
        return examples(self.subject)[self.prompts[site.invocation], site.place, site.part]

    def value(self, like: torch.Tensor | None = None) -> str | None:
        names = [n for n, v in self.values.items() if like is None or v.shape == like.shape]
        return self.draw(st.sampled_from(names)) if names else None

    def read(self, invocation: int, site: Site) -> None:
        name = f"v{len(self.values)}"
        self.lines.append(Read(invocation, name, site))
        self.values[name] = self.example(site)

    def make(self, kind: type[Compute | View], invocation: int, operations: list[str]) -> None:
        operation = self.draw(st.sampled_from(operations))
        operands = self.operands(operation, self.value())
        result = self.tried(operation, operands)
        if result is not None:
            own = result.untyped_storage().data_ptr()
            shared = any(self.values[n].untyped_storage().data_ptr() == own for n in operands)
            name = f"v{len(self.values)}"
            self.lines.append((View if shared else Compute)(invocation, name, operation, operands))
            self.values[name] = result

    def change(self, invocation: int) -> None:
        operation = self.draw(st.sampled_from(self.CHANGED))
        operands = self.operands(operation, self.value())
        if self.tried(operation, operands) is not None:
            self.lines.append(Change(invocation, operation, operands))

    def augment(self, invocation: int) -> None:
        site, operation = self.site(invocation), self.draw(st.sampled_from(AUGMENTED))
        if operation.count("{}") == 1:
            self.lines.append(Augment(invocation, site, operation, ()))
        elif (name := self.value(self.example(site))) is not None:
            self.lines.append(Augment(invocation, site, operation, (name,)))

    def replace(self, invocation: int) -> None:
        site = self.site(invocation)
        if (name := self.value(self.example(site))) is not None:
            self.lines.append(Replace(invocation, site, (name,)))

    def operands(self, operation: str, first: str) -> tuple[str, ...]:
        if operation.count("{}") == 1:
            return (first,)
        return (first, self.value(self.values[first]) or first)

    def tried(self, operation: str, operands: tuple[str, ...]) -> torch.Tensor | None:
        """What an operation makes of examples, None if it does not fit them."""
        try:
            return function_of(operation)(*(self.values[name] for name in operands))
        except (RuntimeError, IndexError, ValueError):
            return None


@st.composite
def programs(draw: Callable[..., Any], subject: Subject) -> Program:
    return Writer(draw, subject).program()


def drawn(shard: int, count: int) -> Callable[[Any], Any]:
    """Settings of a property: other programs in every shard, and the same in every run."""
    options = settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    return lambda function: seed(shard + FIRST)(options(function))


def check(
    subject: Subject,
    program: Program,
    same: Callable[[Any, Any], bool],
    run: Callable[..., list[torch.Tensor]] = replay,
    **options: Any,
) -> None:
    """Compares what a program saves, or that it is refused, with the oracle."""
    try:
        should_be = expected(subject, program)
    except SilentError:
        reject()
    except TooLateError:
        with pytest.raises(CausalityError):
            run(subject, program, **options)
        return
    names = [line.source() for line in program.lines if isinstance(line, Save)]
    for time in ("at first", "with the plan of the first time"):
        saved = run(subject, program, **options)
        for name, value, right in zip(names, saved, should_be, strict=True):
            assert same(value, right), f"{name} keeps\n{value}\n, not\n{right}, {time}"


def close(value: torch.Tensor, right: torch.Tensor) -> bool:
    return value.shape == right.shape and torch.allclose(value, right, atol=1e-5)


@pytest.mark.parametrize("shard", sampled(range(SHARDS), [1]))
def test_programs_of_invocations_that_run_alone(shard: int) -> None:
    @drawn(shard, EACH)
    @given(programs(tower()))
    def agree(program: Program) -> None:
        check(tower(), program, torch.equal)

    agree()


@pytest.mark.parametrize("shard", sampled(range(SHARDS), [1]))
def test_programs_of_invocations_in_one_batch(shard: int) -> None:
    @drawn(shard, EACH)
    @given(programs(language()))
    def agree(program: Program) -> None:
        check(language(), program, close if len(program.prompts) > 1 else torch.equal)

    agree()


@pytest.mark.parametrize("shard", sampled(range(SHARDS), [1]))
def test_programs_however_they_are_divided_into_passes(shard: int) -> None:
    subject = language()

    @drawn(shard + SHARDS, EACH)
    @given(programs(subject), st.integers(1, 12), st.booleans())
    def agree(program: Program, budget: int, share: bool) -> None:
        options = {"max_tokens_per_pass": budget, "share_prefixes": share}
        check(subject, program, close, **options)

    agree()


def permuted(draw: Callable[..., Any], subject: Subject, program: Program) -> Program:
    """A program with lines moved past others that touch neither their memory nor their names."""
    lines = list(zip(program.lines, touched(subject, program), strict=True))
    places = st.integers(0, max(len(lines) - 2, 0))
    for at in draw(st.lists(places, min_size=1, max_size=40)) if len(lines) > 1 else ():
        (one, memory), (other, other_memory) = lines[at : at + 2]
        if memory.isdisjoint(other_memory) and not _related(one, other):
            lines[at : at + 2] = lines[at + 1], lines[at]
    return Program(program.prompts, tuple(line for line, _ in lines))


def _related(one: Line, other: Line) -> bool:
    """Whether one of two lines gives a name that the other uses, or both name one site."""
    makes, used = getattr(one, "name", None), getattr(other, "operands", ())
    site = getattr(one, "site", None)
    return makes in used or (site is not None and site == getattr(other, "site", None))


@pytest.mark.parametrize("make", [tower, language])
@pytest.mark.parametrize("shard", sampled(range(2), [1]))
def test_lines_that_touch_different_memory_may_change_places(
    shard: int, make: Callable[[], Subject]
) -> None:
    subject = make()

    @drawn(shard, EACH // 2)
    @given(st.data())
    def agree(data: st.DataObject) -> None:
        program = data.draw(programs(subject))
        try:
            other = permuted(data.draw, subject, program)
        except SilentError:
            reject()
        saved, again = (outcome(subject, lines) for lines in (program, other))
        note(f"{other!r}")
        assert saved.keys() == again.keys()
        assert all(torch.equal(value, again[line]) for line, value in saved.items())

    agree()


def outcome(subject: Subject, program: Program) -> dict[Any, torch.Tensor]:
    """What a program saves, by the line that saves it; nothing if it is refused."""
    saves = [line for line in program.lines if isinstance(line, Save)]
    numbered = [(line, saves[:at].count(line)) for at, line in enumerate(saves)]
    try:
        return dict(zip(numbered, replay(subject, program), strict=True))
    except CausalityError:
        return {}
