"""Batches of a folder's rows: exact epochs, orders, bounded memory, and going on in the middle."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu import OptionError
from insitu.harvest import Activations, Batches, TopFeatures
from insitu.harvest.reading.shuffling import EpochOrder
from insitu.harvest.reading.stored_rows import StoredRows
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder

SHARDS = [[40, 60, 30], [128, 5], [1], [90, 90, 3], [128]]
ROWS = 575
SITES = [dense(), dense("z:0", (2, 3), "bfloat16"), sparse("sae:1", 3, 20)]
SHUFFLES = [False, True, "full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harvest") / "folder"
    write_folder(path, SHARDS, SITES)
    return path


@pytest.fixture
def activations(folder: Path) -> Activations:
    return Activations.open(folder)


def places(batches: Any) -> list[tuple[int, int]]:
    """The sequence and position of each row that was given, in its order."""
    return [
        place
        for batch in batches
        for place in zip(batch["sequence"].tolist(), batch["position"].tolist(), strict=True)
    ]


def every_place(activations: Activations) -> list[tuple[int, int]]:
    return [*zip(activations.sequence[:].tolist(), activations.position[:].tolist(), strict=True)]


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize(("size", "buffer"), [(32, 128), (7, 64), (100, 40), (1000, 65_536)])
def test_each_row_is_given_once_an_epoch(
    activations: Activations, shuffle: Any, size: int, buffer: int
) -> None:
    batches = activations.batches(size, shuffle=shuffle, buffer=buffer)
    given = [*batches]
    sizes = [len(batch["token_ids"]) for batch in given]
    assert sizes[:-1] == [size] * (len(sizes) - 1) and 0 < sizes[-1] <= size
    found = places(given)
    assert sorted(found) == sorted(every_place(activations))
    assert (found == every_place(activations)) == (shuffle is False)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_what_is_in_a_row_stays_together(activations: Activations, shuffle: Any) -> None:
    at = {place: row for row, place in enumerate(every_place(activations))}
    for batch in activations.batches(50, shuffle=shuffle, buffer=128):
        rows = [at[place] for place in places([batch])]
        for name in (LABEL, "z:0"):
            assert torch.equal(batch[name], activations[name][rows])
        for name in ("token_ids", "document"):
            assert torch.equal(batch[name], getattr(activations, name)[rows])
        features = activations["sae:1"][rows]
        assert isinstance(batch["sae:1"], TopFeatures)
        assert torch.equal(batch["sae:1"].values, features.values)
        assert torch.equal(batch["sae:1"].indices, features.indices)


@pytest.mark.parametrize("shuffle", [True, "full"])
def test_the_order_is_a_function_of_the_seed_and_the_epoch(
    activations: Activations, shuffle: Any
) -> None:
    def orders(seed: int, **options: Any) -> list[list[tuple[int, int]]]:
        batches = activations.batches(32, seed=seed, shuffle=shuffle, **options)
        return [places(batches) for _ in range(3)]

    first = orders(0)
    assert orders(0) == first
    assert orders(0, sites=LABEL) == first  # of the same order whatever is read
    batches = activations.batches(97, shuffle=shuffle)
    assert [places(batches) for _ in range(3)] == first  # and however large batches are
    assert len({tuple(order) for order in [*first, *orders(1), *orders(2**63)]}) == 9


def test_a_shuffle_mixes_runs_of_all_of_the_folder(tmp_path: Path) -> None:
    """Neighbours part, and each batch has rows of everywhere: figures of a full shuffle, nearly."""
    rows = 64 * 256
    write_folder(tmp_path / "a", [[128] * 32] * 4)
    activations = Activations.open(tmp_path / "a")
    batches = [*activations.batches(512, LABEL, buffer=4096)]
    order = torch.tensor([128 * s + p for s, p in places(batches)])
    assert (order.diff().abs() == 1).float().mean() < 0.02
    for first in range(0, rows, 4096):
        window = order[first : first + 4096]
        assert len((window // 64).unique()) == 64  # whole runs
        assert len((window // 4096).unique()) == 4  # of every shard
    for batch in batches:
        of_run = torch.bincount(128 * batch["sequence"] // 64 + batch["position"] // 64)
        # Of a run that it has rows of, 64 * 512 / 4096 = 8; a full shuffle has 2.
        assert 7 < of_run[of_run > 0].float().mean() < 10


def test_a_full_shuffle_draws_from_all_rows(activations: Activations) -> None:
    order = places(activations.batches(64, shuffle="full", buffer=64))
    at = {place: row for row, place in enumerate(every_place(activations))}
    rows = torch.tensor([at[place] for place in order]).float()
    assert abs(float(torch.corrcoef(torch.stack([rows, torch.arange(ROWS).float()]))[0, 1])) < 0.15
    assert (rows.diff().abs() == 1).float().mean() < 0.02


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("masked", [False, True])
def test_going_on_in_an_epoch_gives_the_rest_of_it(
    activations: Activations, shuffle: Any, masked: bool
) -> None:
    where = (lambda ids, position, sequence: position % 3 > 0) if masked else None
    options = {"shuffle": shuffle, "buffer": 128, "seed": 5, "where": where}
    whole = activations.batches(20, **options)
    epochs = [[*whole], [*whole]]
    for stop in (0, 1, 7, len(epochs[0]) - 1, len(epochs[0]), len(epochs[0]) + 3):
        batches = activations.batches(20, **options)
        given = 0
        while given < stop:
            for _ in batches:
                given += 1
                if given == stop:
                    break
        state = json.loads(json.dumps(batches.state))
        again = Activations.open(activations.folder).batches(20, **options, resume=state)
        assert again.state == state
        if stop <= len(epochs[0]):
            same(again, epochs[0][stop:])
            same(again, epochs[1])
        else:
            same(again, epochs[1][stop - len(epochs[0]) :])
            assert again.epoch == 2


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_going_on_with_another_mask_gives_the_rest_of_it(
    activations: Activations, shuffle: Any
) -> None:
    options = {"shuffle": shuffle, "buffer": 128, "seed": 5}
    order = places(activations.batches(20, **options))
    begun = activations.batches(20, **options, where=lambda ids, position, sequence: position > 9)
    for batch in begun:
        done = order.index(places([batch])[-1]) + 1
        rest = activations.batches(7, **options, resume=begun.state)
        assert places(rest) == order[done:]
        some = activations.batches(
            7, **options, resume=begun.state, where=lambda ids, position, sequence: position < 9
        )
        assert places(some) == [place for place in order[done:] if place[1] < 9]


def same(found: Any, expected: list[Any]) -> None:
    given = [*found]
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            pairs = zip(one[name], value, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), name


@pytest.mark.thorough
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 400),
    buffer=st.integers(1, 300),
    size=st.integers(1, 50),
    stop=st.integers(0, 30),
    shuffle=st.sampled_from(SHUFFLES),
    seed=st.integers(0, 2**64 - 1),
    every=st.integers(1, 4),
)
def test_any_epoch_is_exact_and_goes_on_anywhere(
    tmp_path_factory: pytest.TempPathFactory, rows: int, buffer: int, size: int, stop: int,
    shuffle: Any, seed: int, every: int,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("drawn") / "folder"
    lengths = [7] * (rows // 7) + [rows % 7] * (rows % 7 > 0)
    write_folder(path, [lengths[at : at + 5] for at in range(0, len(lengths), 5)])
    activations = Activations.open(path)
    options = {"shuffle": shuffle, "buffer": buffer, "seed": seed}
    options["where"] = lambda ids, position, sequence: sequence % every == 0
    batches = activations.batches(size, LABEL, **options)
    begun = places(itertools.islice(batches, stop))
    rest = activations.batches(size * 2, LABEL, **options, resume=batches.state)
    expected = [place for place in every_place(activations) if place[0] % every == 0]
    if batches.epoch:  # the whole epoch was given
        assert sorted(begun) == sorted(expected)
    else:
        assert sorted(begun + places(rest)) == sorted(expected)


def test_a_mask_leaves_rows_out_and_batches_full(activations: Activations) -> None:
    seen = []

    def where(token_ids: Any, position: Any, sequence: Any) -> torch.Tensor:
        seen.append((token_ids.dtype, position.dtype, sequence.dtype))
        mask = (position > 0) & (token_ids != 7) & (sequence != 3)
        token_ids.zero_()  # what it is given is its own
        return mask

    batches = [*activations.batches(50, where=where, buffer=128)]
    assert {len(batch["position"]) for batch in batches[:-1]} == {50}
    whole = zip(every_place(activations), activations.token_ids[:].tolist(), strict=True)
    expected = [place for place, token in whole if place[1] > 0 and token != 7 and place[0] != 3]
    assert sorted(places(batches)) == sorted(expected)
    assert set(seen) == {(torch.int32, torch.int32, torch.int64)}
    assert any(batch["token_ids"].any() for batch in batches)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (lambda ids, position, sequence: ids, r"a boolean tensor \(575,\), not int32 \(575,\)"),
        (lambda ids, position, sequence: ids[1:] > 0, r"not bool \(574,\)"),
        (lambda ids, position, sequence: True, "not True"),
    ],
)
def test_what_is_no_mask_is_refused(activations: Activations, where: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        next(iter(activations.batches(5, where=where)))


def test_an_error_of_the_mask_is_the_users_own(activations: Activations) -> None:
    with pytest.raises(ZeroDivisionError):
        [*activations.batches(5, where=lambda *given: 1 / 0)]


def test_the_last_batch_can_be_left_out(activations: Activations) -> None:
    batches = activations.batches(100, drop_last=True)
    assert [len(batch["position"]) for batch in batches] == [100] * 5
    assert batches.state["epoch"] == 1
    assert [len(batch["position"]) for batch in batches] == [100] * 5
    assert [*activations.batches(1000, drop_last=True)] == []


def test_batches_without_an_end(activations: Activations) -> None:
    batches = activations.batches(100, LABEL, drop_last=True)
    given = [batch for batch, _ in zip(batches.forever(), range(12), strict=False)]
    assert batches.epoch == 2
    again = activations.batches(100, LABEL, drop_last=True)
    same(given, [*again, *again, *itertools.islice(again, 2)])
    with pytest.raises(OptionError, match="no batch to give"):
        next(activations.batches(1000, drop_last=True).forever())


def test_vectors_are_what_trainers_take(activations: Activations) -> None:
    vectors = activations.batches(100, "z:0").vectors(dtype=torch.float32)
    batches = activations.batches(100, "z:0").forever()
    for _ in range(8):
        expected = next(batches)["z:0"]
        found = next(vectors)
        assert found.dtype == torch.float32 and found.shape == (len(expected), 6)
        assert torch.equal(found, expected.float().flatten(1))
    found = next(activations.batches(100).vectors("z:0"))
    assert found.dtype == torch.bfloat16
    with pytest.raises(OptionError, match="name one of"):
        activations.batches(100).vectors()
    with pytest.raises(OptionError, match="largest features"):
        activations.batches(100).vectors("sae:1")
    with pytest.raises(OptionError, match="not among"):
        activations.batches(100, "z:0").vectors(LABEL)


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_no_more_than_a_buffer_and_a_batch_are_held(
    activations: Activations, shuffle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    taken = StoredRows._taken

    def counted(self: StoredRows[Any], name: str, dtype: torch.dtype, numbers: Any) -> torch.Tensor:
        if name == LABEL:
            read.append(len(numbers))
        return taken(self, name, dtype, numbers)

    monkeypatch.setattr(StoredRows, "_taken", counted)
    batches = activations.batches(16, LABEL, shuffle=shuffle, buffer=96)
    given = 0
    for batch in batches:
        given += len(batch["position"])
        assert sum(read) - given < 96 + 16  # what was read and not given yet
    assert max(read) == 96 and sum(read) == ROWS


def test_rows_that_a_mask_leaves_out_are_not_read(
    activations: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    taken = StoredRows._taken

    def counted(self: StoredRows[Any], name: str, dtype: torch.dtype, numbers: Any) -> torch.Tensor:
        read.extend([len(numbers)] * (name == LABEL))
        return taken(self, name, dtype, numbers)

    monkeypatch.setattr(StoredRows, "_taken", counted)
    [*activations.batches(16, LABEL, where=lambda ids, position, sequence: position == 0)]
    assert sum(read) == activations.sequences


def test_a_window_is_read_in_the_order_of_the_files() -> None:
    for shuffle in (False, True, "full"):
        for reader in range(3):
            order = EpochOrder(1000, shuffle, 0, 0, 200, reader, 3)  # type: ignore[arg-type]
            for number in range(order.windows):
                rows, given = order.window(number)
                assert (rows[1:] > rows[:-1]).all() and sorted(given) == list(range(len(rows)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, "`size` is a whole number from 1"),
        ({"size": 2.5}, "`size` is a whole number"),
        ({"buffer": 0}, "`buffer` is a whole number"),
        ({"seed": -1}, "`seed` is a whole number"),
        ({"seed": 2**64}, "`seed` is a whole number"),
        ({"seed": None}, "`seed` is a whole number"),
        ({"shuffle": "half"}, '`shuffle` is True, False or "full"'),
        ({"shuffle": 1}, "`shuffle` is True"),
        ({"sites": []}, "`sites` are some labels"),
        ({"sites": [LABEL, LABEL]}, "each once"),
        ({"resume": {}}, "`state` of batches"),
        ({"resume": {"seed": "a"}}, "`state` of batches"),
        ({"resume": 3}, "`state` of batches"),
    ],
    ids=str,
)
def test_options_that_have_no_meaning_are_named(
    activations: Activations, options: Any, said: str
) -> None:
    with pytest.raises(OptionError, match=said):
        activations.batches(**{"size": 4, **options})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed 0, and this one has 1"),
        ({"shuffle": "full"}, "shuffle True, and this one has 'full'"),
        ({"buffer": 99}, "buffer 128, and this one has 99"),
    ],
)
def test_a_state_of_another_order_is_refused(
    activations: Activations, changed: Any, said: str
) -> None:
    state = activations.batches(4, buffer=128).state
    with pytest.raises(OptionError, match=said):
        activations.batches(4, **{"buffer": 128, **changed}, resume=state)
    with pytest.raises(OptionError, match="negative"):
        activations.batches(4, buffer=128, resume={**state, "row": -1})


def test_a_state_of_a_folder_that_has_grown_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[3, 4]])
    write_folder(tmp_path / "b", [[3, 4], [5]])
    state = Activations.open(tmp_path / "a").batches(2).state
    with pytest.raises(OptionError, match="rows 7, and this one has 12"):
        Activations.open(tmp_path / "b").batches(2, resume=state)


def test_batches_say_what_they_are(activations: Activations) -> None:
    batches = activations.batches(8, "z:0")
    assert isinstance(batches, Batches)
    assert repr(batches) == "<Batches of 8 of 575 rows: z:0; epoch 0>"
