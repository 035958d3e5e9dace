"""Batches of a model that runs meanwhile: the ranges come from a fake one, and from a real one."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from insitu import InsituError, LanguageModel, OptionError
from insitu.harvest import LiveBatches, TopFeatures
from tests.harvest.test_batches import places

LABEL = "residual_out:1"
LENGTHS = (30, 1, 50, 0, 7, 12, 40)


def made(number: int, rows: int) -> dict[str, torch.Tensor]:
    """A range: each row says in its values where it comes from."""
    position = torch.arange(rows, dtype=torch.int32)
    values = torch.stack([torch.full((rows,), float(number)), position.float()], 1)
    return {
        "token_ids": position * 7 % 11,
        "sequence": torch.full((rows,), number),
        "position": position,
        "document": torch.full((rows,), 10 * number),
        LABEL: values,
        "sae:1/values": values,
        "sae:1/indices": torch.zeros(rows, 2, dtype=torch.int32),
    }


def ranges(lengths: tuple[int, ...] = LENGTHS) -> Callable[[], Iterator[Any]]:
    return lambda: (made(number, rows) for number, rows in enumerate(lengths))


def every_place(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[int, int]]:
    return [(number, row) for number, rows in enumerate(lengths) for row in range(rows)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "insitu-live"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    if threads():
        gc.collect()
    wait_for(lambda: not threads())


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("size", "buffer"), [(8, 16), (5, 1000), (64, 1), (1, 3), (200, 10)])
def test_each_row_is_given_once_an_epoch(shuffle: bool, size: int, buffer: int) -> None:
    batches = LiveBatches(ranges(), size, shuffle=shuffle, buffer=buffer)
    first, second = [*batches], [*batches]
    sizes = [len(batch["position"]) for batch in first]
    assert sizes[:-1] == [size] * (len(sizes) - 1) and 0 < sizes[-1] <= size
    assert sorted(places(first)) == every_place() == sorted(places(second))
    assert (places(first) == every_place()) == (not shuffle)
    assert (places(first) == places(second)) == (not shuffle)
    assert places(LiveBatches(ranges(), size, shuffle=shuffle, buffer=buffer)) == places(first)
    for batch in first:
        assert batch.keys() == {
            *(LABEL, "sae:1"),
            *("token_ids", "sequence", "position", "document"),
        }
        where = torch.stack([batch["sequence"].float(), batch["position"].float()], 1)
        assert torch.equal(batch[LABEL], where)
        assert isinstance(batch["sae:1"], TopFeatures)
        assert torch.equal(batch["sae:1"].values, where)


def test_rows_are_mixed_over_ranges() -> None:
    lengths = (100,) * 20
    order = places(LiveBatches(ranges(lengths), 50, buffer=500))
    rows = torch.tensor([100 * number + row for number, row in order])
    assert (rows.diff().abs() == 1).float().mean() < 0.02
    for first in range(0, 1000, 50):
        assert len((rows[first : first + 50] // 100).unique()) > 3


def test_no_more_is_held_than_the_buffer_and_a_range() -> None:
    begun: list[int] = []

    def source() -> Iterator[Any]:
        for number in range(40):
            begun.append(number)
            yield made(number, 50)

    with LiveBatches(source, 10, buffer=100, ahead=2) as batches:
        given = 0
        for _ in batches:
            given += 10
            # The buffer, a range, a batch that is made, and those that wait.
            assert 50 * len(begun) - given <= 100 + 50 + 10 + 20 + 50
    assert len(begun) == 40 and given == 2000


def test_the_model_runs_ahead_and_waits() -> None:
    begun: list[int] = []

    def source() -> Iterator[Any]:
        for number in range(100):
            begun.append(number)
            yield made(number, 10)

    batches = LiveBatches(source, 10, shuffle=False, ahead=3)
    given = iter(batches)
    next(given)
    wait_for(lambda: len(begun) == 5)  # one taken, three that wait, one that cannot be put
    time.sleep(0.25)
    assert len(begun) == 5
    given.close()
    assert len(begun) <= 6 and not threads()


def test_an_error_of_the_model_reaches_the_loop() -> None:
    def source() -> Iterator[Any]:
        yield made(0, 20)
        raise ZeroDivisionError("in the model")

    batches = LiveBatches(source, 10, shuffle=False)
    seen = []
    with pytest.raises(ZeroDivisionError, match="in the model") as caught:
        for batch in batches:
            seen.append(batch)
    assert len(seen) == 2
    assert "source" in [frame.name for frame in caught.traceback]
    assert not threads()


def test_an_error_at_the_beginning_reaches_the_loop() -> None:
    def source() -> Iterator[Any]:
        raise OSError("no data")

    with pytest.raises(OSError, match="no data"):
        next(iter(LiveBatches(source, 10)))
    with pytest.raises(KeyboardInterrupt):
        next(iter(LiveBatches(interrupted, 10)))


def interrupted() -> Iterator[Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("end", ["break", "close", "with", "del", "error"])
def test_the_thread_ends_with_the_loop(end: str) -> None:
    closed: list[int | None] = []

    def source() -> Iterator[Any]:
        try:
            for number in range(10_000):
                yield made(number, 10)
        finally:
            closed.append(threading.get_ident())

    batches = LiveBatches(source, 10, shuffle=False)
    given = iter(batches)
    next(given)
    (thread,) = threads()
    if end == "break":
        for _ in batches:
            break
        given.close()
    elif end == "close":
        batches.close()
        assert [*given] == []
    elif end == "with":
        with batches:
            next(given)
    elif end == "del":
        del given, batches
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError):
            for _ in batches:
                raise ZeroDivisionError
        given.close()
    wait_for(lambda: not threads())
    assert thread.ident in closed  # it was closed where it ran


def test_closing_wakes_who_waits() -> None:
    """A model that takes long: the loop in another thread ends, although no batch comes."""
    go = threading.Event()

    def source() -> Iterator[Any]:
        yield made(0, 10)
        go.wait()
        yield made(1, 10)

    batches = LiveBatches(source, 10, shuffle=False)
    seen: list[int] = []
    loop = threading.Thread(target=lambda: seen.extend(len(b["position"]) for b in batches))
    loop.start()
    wait_for(lambda: seen == [10] and bool(threads()))  # it has the first batch, and waits
    closing = threading.Thread(target=batches.close)
    closing.start()
    go.set()
    closing.join(5)
    loop.join(5)
    assert not loop.is_alive() and not closing.is_alive()


def test_what_it_shares_with_batches_of_a_folder() -> None:
    where = lambda ids, position, sequence: (position > 0) & (ids != 3)  # noqa: E731
    kept = [(n, r) for n, r in every_place() if r > 0 and r * 7 % 11 != 3]
    assert sorted(places(LiveBatches(ranges(), 8, where=where))) == kept
    sizes = [len(batch["position"]) for batch in LiveBatches(ranges(), 50, drop_last=True)]
    assert sizes == [50, 50]
    batches = LiveBatches(ranges(), 50, drop_last=True)
    vectors = batches.vectors(LABEL, dtype=torch.bfloat16)
    found = [next(vectors) for _ in range(5)]
    assert {tuple(rows.shape) for rows in found} == {(50, 2)} and batches.epoch == 3
    assert found[0].dtype == torch.bfloat16
    vectors.close()
    with pytest.raises(OptionError, match="no batch to give"):
        next(LiveBatches(ranges((3,)), 8, drop_last=True).forever())
    with pytest.raises(OptionError, match="a boolean tensor"):
        next(iter(LiveBatches(ranges(), 8, where=lambda ids, position, sequence: ids)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, "`size` is a whole number"),
        ({"buffer": 0}, "`buffer` is a whole number"),
        ({"ahead": 0}, "`ahead` is a whole number"),
        ({"seed": -1}, "`seed` is a whole number"),
        ({"shuffle": "full"}, "takes all rows"),
        ({"shuffle": "half"}, "`shuffle` is True"),
    ],
    ids=str,
)
def test_options_that_have_no_meaning_are_named(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        LiveBatches(ranges(), **{"size": 4, **options})


def test_ranges_that_do_not_agree_are_refused() -> None:
    def source() -> Iterator[Any]:
        yield made(0, 10)
        yield {name: value for name, value in made(1, 10).items() if name != LABEL}

    with pytest.raises(InsituError, match="A range has"):
        [*LiveBatches(source, 30)]


def test_a_real_model_in_the_thread(gpt2: LanguageModel) -> None:
    """Traces run there as they do anywhere: the values are those of a hook."""
    from tests.conftest import hooked_hidden

    prompts = [torch.randint(0, 100, (1, 9)) for _ in range(6)]

    def source() -> Iterator[Any]:
        for number, ids in enumerate(prompts):
            with gpt2.trace(ids):
                hidden = gpt2.blocks[1].residual_out.save()
            position = torch.arange(9, dtype=torch.int32)
            yield {
                "token_ids": ids[0].int(),
                "sequence": torch.full((9,), number),
                "position": position,
                "document": torch.full((9,), number),
                LABEL: hidden.value[0],
            }

    expected = [hooked_hidden(gpt2.module, "transformer.h.1", ids)[0] for ids in prompts]
    for batch in LiveBatches(source, 16):
        for row, (sequence, position) in enumerate(places([batch])):
            assert torch.allclose(batch[LABEL][row], expected[sequence][position], atol=1e-5)
