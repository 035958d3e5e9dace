"""What is written for other libraries: NumPy, and the data sets that SAELens reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from insitu import MissingPackageError, OptionError, SaveError
from insitu.harvest import Activations
from insitu.harvest.reading.exports import hook_name_of
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder

SITES = [dense(), dense("z:0", (2, 3), "bfloat16"), dense("pre:1", (4,), "float16")]
SHARDS = [[8, 8, 3], [8], [1, 8, 8, 5, 8]]


@pytest.fixture
def written(tmp_path: Path) -> tuple[Activations, dict[str, torch.Tensor]]:
    whole = write_folder(tmp_path / "folder", SHARDS, [*SITES, sparse("sae:1", 3, 20)])
    return Activations.open(tmp_path / "folder"), whole


def test_arrays_have_the_values(written: Any) -> None:
    activations, whole = written
    for label in (LABEL, "z:0", "pre:1"):
        found = activations.to_numpy(label)
        assert found.dtype == {"pre:1": np.float16}.get(label, np.float32)
        assert np.array_equal(found, whole[label].float().numpy())
    assert np.array_equal(activations.to_numpy(LABEL, [5, 2]), whole[LABEL][[5, 2]].numpy())
    assert np.array_equal(activations.to_numpy(LABEL, slice(3)), whole[LABEL][:3].numpy())
    with pytest.raises(OptionError, match="keeps the largest features"):
        activations.to_numpy("sae:1")


def full_sequences(whole: dict[str, torch.Tensor], label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All sequences of 8 rows, the long way."""
    sequences = whole["sequence"]
    kept = [s for s in sequences.unique() if (sequences == s).sum() == 8]
    values = torch.stack([whole[label][sequences == s].float().flatten(1) for s in kept])
    return values, torch.stack([whole["token_ids"][sequences == s] for s in kept])


@pytest.mark.parametrize(
    ("label", "column", "dtype"),
    [
        (LABEL, "blocks.1.hook_resid_post", "float32"),
        ("z:0", "blocks.0.attn.hook_z", "float32"),
        ("pre:1", "blocks.1.mlp.hook_pre", "float16"),
    ],
)
def test_a_data_set_has_a_row_for_each_whole_sequence(
    written: Any, tmp_path: Path, label: str, column: str, dtype: str
) -> None:
    datasets = pytest.importorskip("datasets")
    activations, whole = written
    told = activations.to_arrow(tmp_path / "arrow", label)
    assert (told.column, told.sequences, told.context, told.left_out) == (column, 6, 8, 9)
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert found.column_names == [column, "token_ids"] and len(found) == 6
    width = whole[label][0].numel()
    assert found.features[column].shape == (8, width) and found.features[column].dtype == dtype
    assert found.features["token_ids"].length == 8
    found.set_format("torch")
    values, token_ids = full_sequences(whole, label)
    assert torch.equal(found[:][column].float(), values)
    assert torch.equal(found[:]["token_ids"], token_ids.long())


def test_it_is_what_datasets_itself_writes(written: Any, tmp_path: Path) -> None:
    """Of the same sequences, as SAELens does it: the same schema, values and files of state."""
    datasets = pytest.importorskip("datasets")
    activations, whole = written
    told = activations.to_arrow(tmp_path / "arrow", LABEL)
    values, token_ids = full_sequences(whole, LABEL)
    features = datasets.Features(
        {
            told.column: datasets.Array2D(shape=(8, 4), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=8),
        }
    )
    columns = {told.column: values, "token_ids": token_ids}
    theirs = datasets.Dataset.from_dict(columns, features=features)
    theirs.save_to_disk(str(tmp_path / "theirs"), num_shards=1)
    ours = datasets.load_from_disk(str(tmp_path / "arrow"))
    again = datasets.load_from_disk(str(tmp_path / "theirs"))
    assert ours.data.schema == again.data.schema and ours.features == again.features
    assert ours.data.table.to_pydict() == again.data.table.to_pydict()
    names = {path.name for path in (tmp_path / "arrow").iterdir()}
    assert names == {path.name for path in (tmp_path / "theirs").iterdir()}
    states = [json.loads((tmp_path / n / "state.json").read_text()) for n in ("arrow", "theirs")]
    assert states[0].keys() == states[1].keys()


def test_sequences_are_cut_for_a_shorter_context(written: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    activations, whole = written
    told = activations.to_arrow(tmp_path / "arrow", LABEL, context=3, column="x", dtype="float16")
    assert told.sequences == 6 * 2 + 2 and told.left_out == 57 - 3 * 14
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    found.set_format("torch")
    rows = [start + n for start, count in ((0, 8), (8, 8), (16, 3)) for n in range(count // 3 * 3)]
    assert torch.equal(found[:5]["x"].flatten(0, 1), whole[LABEL][rows].half())


def test_several_files(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("insitu.harvest.reading.exports._FILE_BYTES", 250)
    monkeypatch.setattr("insitu.harvest.reading.exports._PIECE_BYTES", 1)
    activations, whole = written
    activations.to_arrow(tmp_path / "arrow", LABEL)
    names = sorted(path.name for path in (tmp_path / "arrow").glob("*.arrow"))
    assert names == [f"data-{n:05}-of-00003.arrow" for n in range(3)]
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    found.set_format("torch")
    column = "blocks.1.hook_resid_post"
    assert torch.equal(found[:][column], full_sequences(whole, LABEL)[0])


def test_what_cannot_be_written_is_named(written: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    activations, _ = written
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for use, said in [
        (lambda: activations.to_arrow(tmp_path / "full", LABEL), "is not empty"),
        (lambda: activations.to_arrow(tmp_path / "a", "sae:1"), "keeps the largest features"),
        (lambda: activations.to_arrow(tmp_path / "b", LABEL, dtype="bfloat16"), "which Arrow has"),
        (lambda: activations.to_arrow(tmp_path / "c", LABEL, context=0), "`context` is a whole"),
        (lambda: activations.to_arrow(tmp_path / "d", LABEL, context=9), "No sequence has 9 rows"),
        (lambda: activations.to_arrow(tmp_path / "e", LABEL, column="token_ids"), "be called"),
    ]:
        with pytest.raises(OptionError, match=said):
            use()
    with pytest.raises(SaveError, match="cannot be made"):
        activations.to_arrow(tmp_path / "full" / "x" / "y", LABEL)


def test_values_too_large_for_float16_are_not_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    values = {LABEL: torch.full((8, 4), 1e5)}
    write_folder(tmp_path / "folder", [[8]], values=values)
    activations = Activations.open(tmp_path / "folder")
    with pytest.raises(OptionError, match="larger than float16 can hold"):
        activations.to_arrow(tmp_path / "arrow", LABEL, dtype="float16")
    told = activations.to_arrow(tmp_path / "arrow", LABEL)
    found = datasets.load_from_disk(str(tmp_path / "arrow"))
    assert torch.equal(torch.tensor(found[0][told.column]), values[LABEL])


@pytest.mark.thorough
def test_without_datasets_it_says_what_to_install(written: Any, tmp_path: Path) -> None:
    activations, _ = written
    code = f"""
import sys
sys.modules["datasets"] = None
from insitu import MissingPackageError
from insitu.harvest import Activations
try:
    Activations.open({str(activations.folder)!r}).to_arrow({str(tmp_path / "x")!r}, {LABEL!r})
except MissingPackageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'insitu[harvest]'" in done.stdout
    assert issubclass(MissingPackageError, ImportError)


@pytest.mark.thorough
def test_reading_imports_no_heavy_package(written: Any) -> None:
    activations, _ = written
    code = f"""
import sys
import insitu
assert "insitu.harvest" not in sys.modules
from insitu.harvest import Activations
activations = Activations.open({str(activations.folder)!r})
next(iter(activations.batches(4)))
print({{"datasets", "pyarrow", "ray", "pandas", "plotly"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("label", "hook"),
    [
        ("residual_in:0", "blocks.0.hook_resid_pre"),
        ("residual_mid:3", "blocks.3.hook_resid_mid"),
        ("residual_out:11", "blocks.11.hook_resid_post"),
        ("mlp_out:2", "blocks.2.hook_mlp_out"),
        ("attention_out:2", "blocks.2.hook_attn_out"),
        ("mlp.post:2", "blocks.2.mlp.hook_post"),
        ("attention.z:2", "blocks.2.attn.hook_z"),
        ("transformer.h.6.mlp.output", "transformer.h.6.mlp.output"),
        ("grad.residual_out:6", "grad.residual_out:6"),
        ("unheard_of:6", "unheard_of:6"),
    ],
)
def test_columns_have_the_names_of_hooks(label: str, hook: str) -> None:
    assert hook_name_of(label) == hook
