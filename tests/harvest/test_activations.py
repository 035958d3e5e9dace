"""A folder of activations as it is read: rows of any index, what it is, and whether it is whole."""

from __future__ import annotations

import os
import pickle
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from insitu import IndexOutOfRangeError, LoadError, NotCachedError, OptionError
from insitu.harvest import Activations, TopFeatures
from insitu.harvest.layout import Skipped
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder

SHARDS = [[3, 5, 2], [8], [1, 1, 7], [4, 4]]
ROWS = 35
SITES = [
    dense(),
    dense("z:0", (2, 3), "bfloat16"),
    dense("norm:0", (), "float16"),
    sparse("sae:1", 3, 20),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harvest") / "folder"
    write_folder(path, SHARDS, SITES)
    return path


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return write_folder(tmp_path_factory.mktemp("again") / "folder", SHARDS, SITES)


INDICES = [
    *(0, 34, -1, -35, np.int64(7), torch.tensor(9)),
    *(slice(None), slice(5, 20), slice(None, None, 3), slice(30, 2, -4), slice(-3, None)),
    *(slice(9, 9), slice(None, None, -1), range(2, 30, 5), slice(0, 1000)),
    *([], [4], [34, 0, 0, 17, -1], torch.tensor([12, 11, 10]), np.array([1, 30], np.int32)),
    *(torch.arange(35) % 3 == 1, [True] * 35, np.zeros(35, bool), torch.arange(35) * 12 % 35),
]


@pytest.mark.parametrize("index", INDICES, ids=lambda index: " ".join(repr(index).split())[:60])
def test_rows_are_what_the_same_index_gives_of_all_of_them(
    folder: Path, whole: dict[str, torch.Tensor], index: object
) -> None:
    activations = Activations.open(folder)
    plain = torch.as_tensor(index) if isinstance(index, list | np.ndarray) else index
    plain = list(plain) if isinstance(plain, range) else plain
    if isinstance(plain, slice) and (plain.step or 1) < 0:  # torch has none of these
        plain = list(range(ROWS)[plain])
    if isinstance(plain, torch.Tensor) and not plain.numel():
        plain = plain.long()
    for name in (LABEL, "z:0", "norm:0"):
        found = activations[name][index]
        assert torch.equal(found, whole[name][plain]), name
        assert found.dtype == whole[name].dtype == activations.dtype(name)
    features = activations["sae:1"][index]
    assert torch.equal(features.values, whole["sae:1/values"][plain])
    assert torch.equal(features.indices, whole["sae:1/indices"][plain])
    for name in ("token_ids", "sequence", "position", "document"):
        found = getattr(activations, name)[index]
        assert torch.equal(found, whole[name][plain]) and found.dtype == whole[name].dtype


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_index_over_any_shards(data: st.DataObject, tmp_path_factory) -> None:
    shards = data.draw(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5))
    path = tmp_path_factory.mktemp("drawn") / "folder"
    whole = write_folder(path, shards, [dense(dtype="bfloat16")])
    rows = sum(map(sum, shards))
    rows_of = Activations.open(path)[LABEL]
    assert rows_of.shape == (rows, 4)
    chosen = data.draw(st.slices(rows))
    assert torch.equal(rows_of[chosen], whole[LABEL][list(range(rows)[chosen])])
    if rows:
        some = data.draw(st.lists(st.integers(-rows, rows - 1), max_size=30))
        assert torch.equal(rows_of[some], whole[LABEL][torch.tensor(some, dtype=torch.long)])


@pytest.mark.parametrize("index", [35, -36, [0, 35], torch.tensor([-36])], ids=repr)
def test_a_row_that_is_not_there_is_named(folder: Path, index: object) -> None:
    with pytest.raises(IndexOutOfRangeError, match=r"no row (35|-36): there are 35"):
        Activations.open(folder)[LABEL][index]


@pytest.mark.parametrize(
    "index",
    [
        *(None, ..., "a", 1.5, True, torch.tensor(True), (1, 2), [1.5], [[1]], {}),
        *(torch.zeros(34, dtype=torch.bool), torch.zeros(2, 2).long(), slice("a"), [None], [2**80]),
        torch.tensor([0, 1], dtype=torch.uint8),  # torch takes it for a mask, NumPy for numbers
    ],
    ids=repr,
)
def test_what_is_no_index_is_refused(folder: Path, index: object) -> None:
    with pytest.raises(OptionError, match="mask"):
        Activations.open(folder)[LABEL][index]


def test_what_is_given_is_a_copy(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    activations = Activations.open(folder)
    activations[LABEL][:].zero_()
    activations[LABEL][3].zero_()
    assert torch.equal(activations[LABEL][:], whole[LABEL])


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    skipped = {0: [Skipped(1, "it is empty")], 1: [Skipped(7, "no text")]}
    write_folder(tmp_path / "a", [[3, 5], [2]], SITES, skipped=skipped, last=False)
    activations = Activations.open(tmp_path / "a")
    assert activations.sites == (LABEL, "z:0", "norm:0", "sae:1") == tuple(activations)
    assert activations.rows == len(activations) == activations.tokens == 10
    assert activations.sequences == 3
    assert activations.shape("z:0") == (2, 3) and activations["z:0"].shape == (10, 2, 3)
    assert activations.dtype("z:0") == torch.bfloat16
    assert activations.shape("sae:1") == (3,) and activations.dtype("sae:1") == torch.float32
    assert activations.skipped == (Skipped(1, "it is empty"), Skipped(7, "no text"))
    assert not activations.complete
    assert activations.specification.model == "insitu/eiffel"
    assert LABEL in activations and "mlp_out:0" not in activations
    files = (tmp_path / "a" / "shards").iterdir()
    assert activations.bytes == sum(file.stat().st_size for file in files)
    write_folder(tmp_path / "b", [[3, 5], [2]])
    assert Activations.open(tmp_path / "b").complete


def test_a_site_that_was_not_harvested_is_named(folder: Path) -> None:
    activations = Activations.open(folder)
    for use in (activations.shape, activations.dtype, activations.statistics):
        with pytest.raises(NotCachedError, match=r"No site 'residual_out:2'.*'residual_out:1'"):
            use("residual_out:2")
    with pytest.raises(NotCachedError):
        activations["residual_out:2"]
    with pytest.raises(NotCachedError):
        activations.batches(2, "residual_out:2")


def test_features_become_dense(folder: Path, whole: dict[str, torch.Tensor]) -> None:
    found = Activations.open(folder)["sae:1"][4:9].to_dense(20)
    for row, (values, indices) in enumerate(
        zip(whole["sae:1/values"][4:9], whole["sae:1/indices"][4:9], strict=True)
    ):
        expected = torch.zeros(20)
        expected[indices.long()] = values
        assert torch.equal(found[row], expected)
    one = Activations.open(folder)["sae:1"][4]
    assert isinstance(one, TopFeatures) and torch.equal(one.to_dense(20), found[0])
    with pytest.raises(ValueError, match="do not fit into 5"):
        Activations.open(folder)["sae:1"][:].to_dense(5)


def test_a_line_that_is_torn_off_and_files_that_are_not_listed_do_not_count(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "a", [[3, 5], [2, 6]], last=False)
    manifest = tmp_path / "a" / "manifest.jsonl"
    first, second, end = manifest.read_bytes().split(b"\n")
    assert not end
    (tmp_path / "a" / "shards" / "00002.safetensors.tmp").write_bytes(b"x")
    (tmp_path / "a" / "shards" / "00007.safetensors").write_bytes(b"x")
    for torn in (b"", second[:1], second[: len(second) // 2], second, b"\0" * 50, b"\xff"):
        manifest.write_bytes(first + b"\n" + torn)
        activations = Activations.open(tmp_path / "a")
        assert activations.rows == 8 and not activations.complete
        assert torch.equal(activations[LABEL][:], whole[LABEL][:8])
        assert activations.check() == []


def test_a_harvest_that_has_just_begun_has_no_rows(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[3]])
    (tmp_path / "a" / "manifest.jsonl").unlink()
    activations = Activations.open(tmp_path / "a")
    assert activations.rows == 0 and not activations.complete
    assert activations[LABEL][:].shape == (0, 4)
    assert list(activations.batches(4)) == []
    with pytest.raises(OptionError, match="no rows yet"):
        activations.statistics(LABEL)
    assert "0 rows" in repr(activations)


def test_one_row_reads_no_whole_shard(tmp_path: Path) -> None:
    """Of 64 MB that are mapped, a row brings in some pages. They are counted by the system."""
    rows = 2**16
    write_folder(
        tmp_path / "a", [[rows]], [dense(shape=(256,))], values={LABEL: torch.zeros(rows, 256)}
    )
    activations = Activations.open(tmp_path / "a")
    rows_of = activations[LABEL]
    assert float(rows_of[40_000].sum() + rows_of[[7, 60_000]].sum()) == 0
    activations.statistics(LABEL)
    some = mapped_in("00000.safetensors")
    assert rows_of[:].shape == (rows, 256)
    assert 0 < some < 16_000 < 60_000 < mapped_in("00000.safetensors")


def mapped_in(file: str) -> int:
    """How much of a file that is mapped has been read, in kB."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    found = [re.search(r"^Rss: +(\d+) kB", part, re.M) for part in parts if file in part]
    return sum(int(one[1]) for one in found if one)


def test_few_files_are_open_however_many_shards(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "a", [[2]] * 60)
    activations = Activations.open(tmp_path / "a")
    before = len(os.listdir("/proc/self/fd"))
    assert torch.equal(activations[LABEL][:], whole[LABEL])
    assert torch.equal(activations[LABEL][torch.arange(119, -1, -1)], whole[LABEL].flip(0))
    assert len(os.listdir("/proc/self/fd")) - before <= 16


def test_it_goes_to_another_process_as_it_was_opened(tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "a", [[3], [2]])
    activations = Activations.open(tmp_path / "a")
    sent = pickle.dumps(activations)
    (tmp_path / "a" / "manifest.jsonl").write_bytes(b"")
    again = pickle.loads(sent)
    assert again.rows == 5 and torch.equal(again[LABEL][:], whole[LABEL])
    assert len(sent) < 5_000


def test_a_folder_is_found_after_a_change_of_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_folder(tmp_path / "a", [[3], [2]])
    monkeypatch.chdir(tmp_path)
    activations = Activations.open("a")
    monkeypatch.chdir("/")
    assert torch.equal(activations[LABEL][:], whole[LABEL])


def test_shards_that_are_not_as_they_were_written_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", [[3], [2], [4], [5], [6]])
    activations = Activations.open(tmp_path / "a")
    assert activations.check() == []
    shards = sorted((tmp_path / "a" / "shards").iterdir())
    shards[0].unlink()
    data = bytearray(shards[1].read_bytes())
    data[-1] ^= 1
    shards[1].write_bytes(data)
    shards[3].write_bytes(shards[3].read_bytes()[:-1])
    broken = Activations.open(tmp_path / "a").check()
    assert [one.shard for one in broken] == [0, 1, 3]
    assert [one.file for one in broken] == [f"shards/0000{n}.safetensors" for n in (0, 1, 3)]
    assert "No such file" in broken[0].reason
    assert "digest" in broken[1].reason
    assert "the manifest says" in broken[2].reason
    with pytest.raises(LoadError, match="verify=True"):
        Activations.open(tmp_path / "a")[LABEL][:]
    assert Activations.open(tmp_path / "a")[LABEL][5:9].shape == (4, 4)  # of a shard that is whole


def test_it_is_printed_as_a_table(folder: Path) -> None:
    activations = Activations.open(folder)
    out = StringIO()
    Console(file=out, width=100).print(activations)
    for shown in (repr(activations), out.getvalue(), activations._repr_html_()):
        assert "insitu/eiffel" in shown and "35 rows of 35 tokens in 4 shards" in shown
        assert "residual_out:1" in shown and "(2, 3)" in shown and "bfloat16" in shown
        assert "3 of 20 features" in shown
    assert f"{35 * 16:,}" in out.getvalue() and f"{35 * 3 * 8:,}" in out.getvalue()
    assert repr(activations[LABEL]) == "<Rows of residual_out:1: (35, 4), float32>"


def test_a_loop_over_rows_is_told_of_batches(folder: Path) -> None:
    with pytest.raises(OptionError, match="batches"):
        list(Activations.open(folder)[LABEL])
