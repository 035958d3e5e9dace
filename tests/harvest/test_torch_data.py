"""The data set of PyTorch: each row once an epoch, over all workers and all ranks."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from insitu import OptionError
from insitu.harvest import Activations
from insitu.harvest.reading.shuffling import EpochOrder
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder
from tests.harvest.test_batches import every_place, places
from tests.thinning import sampled

SHUFFLES = [False, True, "full"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard, so fewer than there are workers."""
    path = tmp_path_factory.mktemp("harvest") / "folder"
    write_folder(path, [[128, 100, 90, 1]], [dense(), sparse("sae:1", 3, 20)])
    return path


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("workers", sampled([0, 1, 2, 3], [0, 2]))
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on few cores
def test_each_row_once_an_epoch_over_all_workers(folder: Path, workers: int, shuffle: Any) -> None:
    activations = Activations.open(folder)
    dataset = activations.dataset(16, shuffle=shuffle, buffer=64)
    batches = [*DataLoader(dataset, batch_size=None, num_workers=workers)]
    found = places(batches)
    assert sorted(found) == sorted(every_place(activations))
    assert {type(batch["sae:1"]).__name__ for batch in batches} == {"TopFeatures"}
    at = {place: row for row, place in enumerate(every_place(activations))}
    values = torch.cat([batch[LABEL] for batch in batches])
    assert torch.equal(values, activations[LABEL][[at[place] for place in found]])


@pytest.mark.parametrize("shuffle", sampled(SHUFFLES, ["full"]))
def test_each_row_once_an_epoch_over_workers_and_ranks(folder: Path, shuffle: Any) -> None:
    activations = Activations.open(folder)
    found, sizes = [], []
    for rank in range(3):
        dataset = activations.dataset(16, LABEL, shuffle=shuffle, rank=rank, world_size=3)
        given = places(DataLoader(dataset, batch_size=None, num_workers=2))
        sizes.append(len(given))
        found += given
    assert sorted(found) == sorted(every_place(activations))
    assert max(sizes) - min(sizes) <= 2  # one row for each worker


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(0, 500),
    readers=st.integers(1, 9),
    buffer=st.integers(1, 200),
    shuffle=st.sampled_from(SHUFFLES),
    epoch=st.integers(0, 3),
)
def test_any_division_is_exact(
    rows: int, readers: int, buffer: int, shuffle: Any, epoch: int
) -> None:
    found: list[int] = []
    sizes: list[int] = []
    for reader in range(readers):
        order = EpochOrder(rows, shuffle, 3, epoch, buffer, reader, readers)
        own = [int(row) for n in range(order.windows) for row in order.window(n)[0]]
        sizes.append(len(own))
        found += own
    assert sorted(found) == list(range(rows))
    assert max(sizes) - min(sizes) <= 1


def test_epochs_differ_and_are_chosen(folder: Path) -> None:
    dataset = Activations.open(folder).dataset(16, LABEL)
    first = places(dataset)
    assert places(dataset) == first
    dataset.set_epoch(1)
    second = places(dataset)
    assert second != first and sorted(second) == sorted(first)
    batches = Activations.open(folder).batches(16, LABEL)
    assert [places(batches), places(batches)] == [first, second]  # the same orders
    for epoch in (-1, 1.5, None):
        with pytest.raises(OptionError, match="`epoch` is a whole number from 0"):
            dataset.set_epoch(epoch)  # type: ignore[arg-type]


def test_workers_that_stay_are_told_of_the_epoch(folder: Path) -> None:
    dataset = Activations.open(folder).dataset(16, LABEL)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 1):
        dataset.set_epoch(epoch)
        orders.append(places(loader))
    assert orders[0] != orders[1] == orders[2]


def test_with_the_last_left_out_all_give_as_many(tmp_path: Path) -> None:
    for rows, ranks, size in itertools.product((95, 96, 97, 128), (2, 3), (8, 16, 17)):
        path = tmp_path / f"{rows}-{ranks}-{size}"
        write_folder(path, [[rows]])
        counts = []
        for rank in range(ranks):
            options: Any = {"rank": rank, "world_size": ranks, "drop_last": True}
            dataset = Activations.open(path).dataset(size, LABEL, **options)
            given = [len(batch["position"]) for batch in dataset]
            assert set(given) <= {size}
            counts.append(len(given))
        assert counts == [rows // ranks // size] * ranks


def test_a_mask_goes_to_the_workers(folder: Path) -> None:
    activations = Activations.open(folder)
    dataset = activations.dataset(16, LABEL, where=lambda ids, position, sequence: position > 4)
    found = places(DataLoader(dataset, batch_size=None, num_workers=2))
    assert sorted(found) == sorted(place for place in every_place(activations) if place[1] > 4)


@pytest.mark.slow
def test_it_goes_to_workers_that_are_spawned(folder: Path) -> None:
    """They unpickle it, in a process that has read nothing."""
    code = f"""
from torch.utils.data import DataLoader
from insitu.harvest import Activations
if __name__ == "__main__":
    dataset = Activations.open({str(folder)!r}).dataset(16, {LABEL!r}, rank=0, world_size=2)
    options = {{"num_workers": 2, "multiprocessing_context": "spawn"}}
    loader = DataLoader(dataset, batch_size=None, persistent_workers=True, **options)
    dataset.set_epoch(0)
    print(sum(len(batch["position"]) for batch in loader))
    dataset.set_epoch(1)
    print(sorted(int(s) * 1000 + int(p) for batch in loader
                 for s, p in zip(batch["sequence"], batch["position"]))[:3])
"""
    script = folder.parent / "spawning.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
    count, begun = done.stdout.splitlines()
    dataset = Activations.open(folder).dataset(16, LABEL, rank=0, world_size=2)
    assert int(count) == len(places(dataset))
    dataset.set_epoch(1)
    assert begun == str(sorted(1000 * s + p for s, p in places(dataset))[:3])


@pytest.mark.slow
def test_ranks_are_those_of_the_process_group(folder: Path) -> None:
    """Two processes with `gloo`, which start a data loader of two workers each."""
    code = f"""
import sys
import torch.distributed
from torch.utils.data import DataLoader
from insitu.harvest import Activations
from tests.harvest.test_batches import places
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method="file://" + store, rank=rank, world_size=2
)
dataset = Activations.open({str(folder)!r}).dataset(16, {LABEL!r})
print(places(DataLoader(dataset, batch_size=None, num_workers=2)))
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", code]
    store = str(folder.parent / "store")
    processes = [
        subprocess.Popen([*command, str(rank), store], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        found += eval(out)
    assert sorted(found) == sorted(every_place(Activations.open(folder)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "given together"),
        ({"world_size": 2}, "given together"),
        ({"rank": 2, "world_size": 2}, "no rank 2 of 2"),
        ({"rank": -1, "world_size": 2}, "`rank` is a whole number from 0"),
        ({"rank": 0, "world_size": 0}, "`world_size` is a whole number"),
        ({"size": 0}, "`size` is a whole number"),
        ({"shuffle": "none"}, "`shuffle` is True"),
    ],
    ids=str,
)
def test_options_that_have_no_meaning_are_named(folder: Path, options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Activations.open(folder).dataset(**{"size": 4, **options})


def test_it_is_small_when_it_is_sent(folder: Path) -> None:
    assert len(pickle.dumps(Activations.open(folder))) < 5_000
