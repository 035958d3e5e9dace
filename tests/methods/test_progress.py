"""Bars, and who is told how far a run has come."""

import io

import pytest
from rich.console import Console

from insitu import LanguageModel, listening
from insitu.batching.summary import Planned
from insitu.engine.seams import seams
from insitu.methods.progress import Bar, progress


class Shown:
    """Stands for where bars are shown: keeps how far they have come."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.notes: list[str] = []
        self.gone = 0

    def add_task(self, title: str, total: float | None, note: str) -> int:
        return 0

    def update(self, task: int, completed=None, total=None, note=None) -> None:
        if note is not None:
            self.notes.append(note)
        else:
            self.shares.append(completed / total)

    def remove_task(self, task: int) -> None:
        self.gone += 1


@pytest.fixture
def shown() -> Shown:
    return Shown()


@pytest.fixture
def bar(shown: Shown) -> Bar:
    return Bar(shown, "Working")  # pyright: ignore[reportArgumentType]


def sweep(model: LanguageModel) -> Planned:
    """A trace of several passes, of which some do more than others."""
    clean = "Istanbul is in Turkey. Paris is in France. The Louvre is in the city of"
    corrupt = "Istanbul is in Turkey. Paris is in France. The Kremlin is in the city of"
    with model.trace() as tracer:
        with tracer.invoke(clean):
            states = [block.output[0] for block in model.blocks]
        for block, state in zip(model.blocks, states, strict=True):
            for position in range(17):
                with tracer.invoke(corrupt):
                    block.output[0][:, position] = state[:, position]
                    model.logits[0, -1].max().save()
    return tracer.plan


def test_a_loop_shows_how_many_are_done(bar: Bar, shown: Shown) -> None:
    assert list(bar.each("abcd")) == ["a", "b", "c", "d"]
    assert shown.shares == [0, 0.25, 0.5, 0.75, 1]
    bar.say("loss 0.5")
    assert shown.notes == ["loss 0.5"]


def test_a_run_in_a_loop_moves_the_bar_by_its_part(bar: Bar, shown: Shown) -> None:
    for _ in bar.each(range(2)):
        bar.reached(1, 4)
    assert shown.shares == [0, 0.125, 0.5, 0.625, 1]
    for _ in bar.each(range(2)):
        for _ in bar.each(range(2)):
            pass
    assert shown.shares[5:] == [0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]


def test_what_does_not_know_how_much_it_is_goes_on(bar: Bar, shown: Shown) -> None:
    assert sum(bar.each(iter(range(3)))) == 3
    assert sum(bar.each(iter(range(2)), total=2)) == 1
    assert shown.shares == [1, 0, 0.5, 1]


@pytest.mark.thorough
@pytest.mark.no_wire  # another run would be told of too
def test_a_run_moves_the_bar_after_each_pass_by_what_it_costs(
    eiffel: LanguageModel, bar: Bar, shown: Shown
) -> None:
    with listening(bar.hears):
        plan = sweep(eiffel)
    costs = [single.flops for single in plan.passes]
    assert len(set(costs)) > 2
    wanted = [sum(costs[:n]) / sum(costs) for n in range(len(costs) + 1)]
    assert [*dict.fromkeys(shown.shares)] == pytest.approx(wanted)


@pytest.mark.no_wire
def test_of_one_pass_the_cost_is_not_found_out(gpt2: LanguageModel, bar: Bar, shown: Shown) -> None:
    with listening(bar.hears):
        with gpt2.trace([1, 2]):
            gpt2.lm_head.output.save()
        assert shown.shares == [0, 1]
        with gpt2.generate([1, 2], max_new_tokens=2) as generator:
            pass
    assert shown.shares == [0, 1] * 2
    assert generator.output.shape == (1, 4)


def listeners() -> tuple[object, ...]:
    now = seams.get()
    return () if now is None else now.listeners


def test_nobody_listens_after_the_block_however_it_ends(gpt2: LanguageModel) -> None:
    with pytest.raises(ZeroDivisionError), progress("Failing", True):
        assert len(listeners()) == 1
        raise ZeroDivisionError
    assert seams.get() is None
    with progress("Silent", False):
        assert seams.get() is None


@pytest.mark.parametrize(
    ("given", "variable", "terminal", "wanted"),
    [
        (None, None, True, True),
        (None, None, False, False),
        (None, "0", True, False),
        (False, None, True, False),
        (True, "0", False, True),
    ],
)
def test_who_decides_whether_there_is_a_bar(monkeypatch, given, variable, terminal, wanted) -> None:
    monkeypatch.delenv("INSITU_PROGRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("INSITU_PROGRESS", variable)
    file = io.StringIO()

    def console(stderr: bool) -> Console:
        return Console(file=file, force_terminal=terminal, width=80)

    monkeypatch.setattr("rich.console.Console", console)
    with progress("Patching [heads]", given) as bar:
        for _ in bar.each(range(2)):
            pass
        with progress("Inner"):
            pass
    if terminal:
        assert ("Patching [heads]" in file.getvalue()) is wanted
    assert bool(bar._progress) is wanted


def test_a_silent_block_in_another_leaves_that_ones_bar_alone() -> None:
    with progress("Outer", True) as outer:
        with progress("Inner", False) as inner:
            assert listeners() == (outer.hears,)
            assert inner._progress is None


def test_a_bar_within_another_is_the_one_that_moves_beside_others_who_listen() -> None:
    def listener(event: object) -> None: ...

    with listening(listener), progress("Outer", True) as outer:
        assert listeners() == (listener, outer.hears)
        with progress("Inner", True) as inner:
            assert listeners() == (listener, inner.hears)
        assert listeners() == (listener, outer.hears)
