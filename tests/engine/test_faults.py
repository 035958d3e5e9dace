"""An exception at any line of Insitu's leaves the model as it was, or the next block mends it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from insitu import LanguageModel
from tests.conftest import tiny_gpt2
from tests.engine.faults import Fault, Kind, free_for_others, kinds, state_of
from tests.thinning import sampled

pytestmark = pytest.mark.filterwarnings("ignore:Attention scores:UserWarning")
KINDS = kinds()
ERRORS = (KeyboardInterrupt, RuntimeError)
COLD = ("read", "write", "in_place", "gradient", "generate", "edit", "session", "stop")


@pytest.fixture(autouse=True)
def no_fault_is_survived() -> Iterator[None]:
    """Takes the place of the suite's own: here a trial may survive the fault that is put there."""
    yield


@pytest.fixture(autouse=True)
def round_trip() -> Iterator[None]:
    """Takes the place of the suite's own, which runs each block twice: a fault comes once."""
    yield


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = {*before, *after}
    pairs = [(name, before.get(name), after.get(name)) for name in sorted(names)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def check(kind: Kind, model: LanguageModel, fault: Fault) -> bool:
    """Runs a block with a fault in it, and the same again; returns whether the fault came."""
    before, said = state_of(model.module), list[str]()
    fault.run(lambda: said.append(kind.wrong(model)))
    assert said in ([], [""]), (fault.hit, "what went on in spite of it was wrong", said)
    left = differences(before, state_of(model.module))
    assert kind.wrong(model) == "", (fault.hit, "left", left)
    still = differences(before, state_of(model.module))
    assert not still, (fault.hit, still)
    assert not left, (fault.hit, "only the next block has put it back", left)
    return fault.hit is not None


def lines_of(kind: Kind, model: LanguageModel) -> int:
    fault = Fault(0)
    fault.run(lambda: kind.wrong(model))
    return fault.lines


def inject(name: str, faults: int, seed: int) -> None:
    """Puts faults at random lines of blocks, of which all but the first are planned already."""
    kind, draw = KINDS[name], random.Random(f"{name} {seed}")
    model = LanguageModel(tiny_gpt2())
    first = lines_of(kind, LanguageModel(tiny_gpt2()))
    for _ in range(3):
        assert kind.wrong(model) == ""
    count = lines_of(kind, model)
    hit = 0
    for number in range(faults):
        error = draw.choice(ERRORS)
        if number % 4 == 0 and name in COLD:
            new = LanguageModel(tiny_gpt2())
            hit += check(kind, new, Fault(draw.randint(1, first), error))
        else:
            hit += check(kind, model, Fault(draw.randint(1, count), error))
    assert hit > faults * 0.9
    assert free_for_others(model)


@pytest.mark.parametrize(
    "name", sampled(KINDS, ["read", "write", "gradient", "generate", "session"])
)
def test_a_fault_at_a_random_line_leaves_nothing(name: str) -> None:
    inject(name, 13, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", KINDS)
def test_faults_at_five_thousand_random_lines_leave_nothing(name: str, seed: int) -> None:
    inject(name, 84, seed + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pattern", "batch", "skip", "scan"])
def test_faults_in_first_runs_with_trials_leave_nothing(name: str) -> None:
    kind, draw = KINDS[name], random.Random(name)
    count = lines_of(kind, LanguageModel(tiny_gpt2()))
    for _ in range(30):
        fault = Fault(draw.randint(1, count), draw.choice(ERRORS))
        check(kind, LanguageModel(tiny_gpt2()), fault)


@pytest.mark.parametrize(
    "name",
    sampled(
        ["read", "pattern", "skip", "generate", "gradient"],
        ["read", "skip", "generate", "gradient"],
    ),
)
def test_what_could_not_be_taken_off_is_taken_off_by_the_next_block(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, model = KINDS[name], LanguageModel(tiny_gpt2())
    assert kind.wrong(model) == ""
    before = state_of(model.module)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("insitu.graph.changes.Changes.undo", interrupted)
        patch.setattr("insitu.engine.passes.remove_hooks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kind.block(model)
    assert differences(before, state_of(model.module))
    assert kind.wrong(model) == ""
    assert not differences(before, state_of(model.module))
