"""Folders that are broken or hostile: each is refused with a reason, or is as it says."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from insitu import InsituError, LoadError
from insitu.harvest import Activations
from tests.harvest.made_folders import LABEL, dense, sparse, write_folder
from tests.thinning import sampled

SITES = [dense(), dense("z:0", (2, 3), "bfloat16"), sparse("sae:1", 3, 20)]
DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE = [
    *(None, True, -1, 0, 1, 7, 10**18, 2**63, 10**30, 1.5, 1e308, "", "x", "\x1b[2J", "mean"),
    *([], {}, [[]], [None], ["x"], [1, 2, 3], [2**62, 4], [0], [-1], {"x": 1}, DEEP),
]
TEXTS = [
    *(b"", b"{", b"nul", b"[]", b"1", b"null", b"\xff\xfe", b"\0" * 100, b'{"format": 1}'),
    *(b"[" * 50_000 + b"]" * 50_000, b'{"model":' * 20_000, b"1" * 5_000, b'{"format": 2}'),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "folder", [[3, 5], [4], [6]], SITES)
    return tmp_path / "folder"


def used(folder: Path) -> bool:
    """What a session does with a folder: whether it was taken. Only errors of ours may come."""
    try:
        activations = Activations.open(folder)
        repr(activations), activations._repr_html_(), activations.skipped
        out = StringIO()
        Console(file=out, width=80).print(activations)
        assert "\x1b" not in out.getvalue() + repr(activations)
        activations.check()
        for site in activations.sites:
            rows = activations[site]
            if len(rows):
                rows[0], rows[-1], rows[:5], rows[[0, len(rows) - 1]]
            if activations.rows < 1000:
                rows[:]
        if activations.rows and LABEL in activations:
            activations.statistics(LABEL)
        for batch in activations.batches(4, buffer=8):
            assert len(batch["sequence"]) <= 4
            if activations.rows > 1000:
                break
    except InsituError as error:
        assert len(str(error)) < 2_000
        return False
    return True


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a tree of JSON."""
    yield path
    if isinstance(tree, dict | list):
        keys = tree if isinstance(tree, dict) else range(len(tree))
        for key in keys:
            yield from places(tree[key], (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    made = dict(tree) if isinstance(tree, dict) else list(tree)
    made[path[0]] = put(tree[path[0]], path[1:], value)
    return made


def test_what_is_whole_is_taken(folder: Path) -> None:
    assert used(folder)


@pytest.mark.parametrize("name", sampled(["harvest.json", "manifest.jsonl"], ["manifest.jsonl"]))
def test_other_values_in_the_descriptions(folder: Path, name: str) -> None:
    path = folder / name
    first, *rest = path.read_bytes().split(b"\n")
    told, end = json.loads(first), b"\n".join([b"", *rest])
    fields = [*places(told)]
    assert len(fields) > 15
    taken = 0
    for field in fields:
        for value in HOSTILE:
            path.write_bytes(json.dumps(put(told, field, value)).encode() + end)
            taken += used(folder)
    assert 0 < taken < len(fields) * len(HOSTILE)
    for field in [key for key in told if key not in ("format", "last", "features")]:
        fewer = {key: value for key, value in told.items() if key != field}
        path.write_bytes(json.dumps(fewer).encode() + end)
        with pytest.raises(LoadError, match=name):
            Activations.open(folder)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: f"{text[:12]!r}")
def test_texts_that_are_no_descriptions(folder: Path, text: bytes) -> None:
    specification, manifest = folder / "harvest.json", folder / "manifest.jsonl"
    lines = manifest.read_bytes()
    manifest.write_bytes(text + b"\n" + lines)
    with pytest.raises(LoadError, match=r"line 1 of .*manifest\.jsonl"):
        Activations.open(folder)
    manifest.write_bytes(lines)
    specification.write_bytes(text)
    with pytest.raises(LoadError, match=r"harvest\.json"):
        Activations.open(folder)


def test_lines_that_contradict_each_other(folder: Path) -> None:
    manifest = folder / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    told = [json.loads(line) for line in lines]

    def written(*changed: dict[str, Any]) -> None:
        manifest.write_text("".join(json.dumps(line) + "\n" for line in changed))

    for changed, said in [
        ([told[1]], "line 1 is of shard 1, not 0"),
        ([told[0], told[0]], "line 2 is of shard 0, not 1"),
        ([told[0], told[2]], "line 2 is of shard 2, not 1"),
        ([told[0], {**told[1], "first_sequence": 1}], "does not begin with sequence 2"),
        ([{**told[0], "last": True}, told[1]], "comes behind the last one"),
        ([{**told[0], "rows": -1}], "is negative"),
        ([{**told[0], "rows": 10**15}], "would not fit into its file"),
        ([{**told[0], "rows": 10**15, "bytes": 2**63}], "larger than any disk"),
    ]:
        written(*changed)
        with pytest.raises(LoadError, match=said):
            Activations.open(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": "token_ids"}, "one name"),
        ({"label": "z:0"}, "one name"),
        ({"label": "z:0/sum", "shape": [2, 3]}, "one name"),
        ({"dtype": "complex64"}, "dtype 'complex64'"),
        ({"dtype": "float64; import os"}, "has the dtype"),
        ({"shape": [2**62, 2]}, "impossible shape"),
        ({"shape": [1] * 40}, "impossible shape"),
        ({"shape": [-1]}, "impossible shape"),
        ({"features": 0}, "keeps"),
        ({"features": 3}, "keeps"),
        ({"features": 2**40}, "keeps"),
        ({"shape": [2, 2], "features": 20}, "keeps"),
    ],
    ids=str,
)
def test_sites_that_cannot_be(folder: Path, changed: Any, said: str) -> None:
    told = json.loads((folder / "harvest.json").read_text())
    told["sites"][0].update(changed)
    (folder / "harvest.json").write_text(json.dumps(told))
    with pytest.raises(LoadError, match=said):
        Activations.open(folder)


def rewritten(folder: Path, data: bytes, *, number: int = 1) -> None:
    """Puts bytes in the place of a shard, and lets the manifest say that this is right."""
    (folder / f"shards/{number:05}.safetensors").write_bytes(data)
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    told = json.loads(lines[number])
    told.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    lines[number] = json.dumps(told).encode()
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def with_header(data: bytes, header: Any) -> bytes:
    """A shard with another header, and the same tensors behind it."""
    size = struct.unpack("<Q", data[:8])[0]
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + size :]


@pytest.mark.thorough
def test_headers_that_lie(folder: Path) -> None:
    data = (folder / "shards/00001.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    kept = Activations.open(folder)[LABEL][:8]
    taken, draw = 0, random.Random(0)
    for field in places(header):
        for value in draw.sample(HOSTILE, 6):
            rewritten(folder, with_header(data, put(header, field, value)))
            taken += used(folder)
            assert torch.equal(Activations.open(folder)[LABEL][:8], kept)  # of the shard before
    assert taken < 20  # as where what is put is what was there
    for name in header:
        fewer = {key: value for key, value in header.items() if key != name}
        rewritten(folder, with_header(data, fewer))
        with pytest.raises(LoadError, match="it has no tensor"):
            Activations.open(folder)[LABEL][:]
    for name, tensor in header.items():
        for shift in ((0, -1), (1, 0), (-1, 0), (0, 1), (len(data), len(data)), (0, 2**62)):
            moved = [a + b for a, b in zip(tensor["data_offsets"], shift, strict=True)]
            rewritten(
                folder, with_header(data, {**header, name: {**tensor, "data_offsets": moved}})
            )
            with pytest.raises(LoadError, match=r"00001\.safetensors"):
                Activations.open(folder)[LABEL][:]
    for text in TEXTS:
        rewritten(folder, with_header(data, text))
        with pytest.raises(LoadError, match=r"00001\.safetensors"):
            Activations.open(folder)[LABEL][:]
    for length in (0, 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1):
        rewritten(folder, struct.pack("<Q", length) + data[8:])
        with pytest.raises(LoadError, match="header"):
            Activations.open(folder)[LABEL][:]
    rewritten(folder, data)
    assert used(folder)


def test_a_header_of_many_tensors_more_is_read(folder: Path) -> None:
    """What is not asked for is not looked at."""
    data = (folder / "shards/00001.safetensors").read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.update({f"x{n}": n for n in range(1_000)}, __metadata__={"a": "b"})
    rewritten(folder, with_header(data, header))
    assert used(folder)


@pytest.mark.thorough
def test_shards_that_are_cut_off_or_changed(folder: Path) -> None:
    path = folder / "shards/00001.safetensors"
    data = path.read_bytes()
    for size in (*range(0, 12), len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(LoadError, match=f"it has {size} bytes, and the manifest says"):
            Activations.open(folder)[LABEL][:]
        rewritten(folder, data[:size])
        with pytest.raises(LoadError, match=r"00001\.safetensors|would not fit into its file"):
            Activations.open(folder)[LABEL][:]
        rewritten(folder, data)
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            near = len(data) if draw.random() < 0.3 else len(data) // 2  # mostly the header
            changed[draw.randrange(near)] = draw.randrange(256)
        path.write_bytes(changed)
        used(folder)
        assert bytes(changed) == data or [b.shard for b in Activations.open(folder).check()] == [1]
        rewritten(folder, bytes(changed))  # as somebody would who means harm
        used(folder)
        rewritten(folder, data)


def test_features_that_there_are_not_are_refused_where_they_are_made_dense(folder: Path) -> None:
    whole = write_folder(
        folder.parent / "other",
        [[3]],
        [sparse("sae:1", 2, 20)],
        values={"sae:1/indices": torch.tensor([[0, 20], [-1, 3], [2**31 - 1, 4]]).int()},
    )
    found = Activations.open(folder.parent / "other")["sae:1"]
    assert torch.equal(found[:].indices, whole["sae:1/indices"])
    for row in range(3):
        with pytest.raises(InsituError, match="do not fit into 20"):
            found[row].to_dense(20)


def test_what_is_no_file(folder: Path, tmp_path: Path) -> None:
    for name in ("harvest.json", "manifest.jsonl", "shards/00001.safetensors"):
        path = folder / name
        data = path.read_bytes()
        for make in (
            lambda path: path.mkdir(),
            lambda path: os.mkfifo(path),
            lambda path: path.symlink_to(path),
            lambda path: path.symlink_to("/dev/zero"),
            lambda path: path.symlink_to(tmp_path / "nowhere"),
            lambda path: path.symlink_to(tmp_path),
        ):
            path.unlink()
            make(path)
            with pytest.raises(LoadError):
                Activations.open(folder)[LABEL][:]
            assert not used(folder)
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            path.write_bytes(data)
    # A link to the file itself is followed: shards may lie on another disk.
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert used(folder)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in [
        ("none", "There is no folder"),
        ("file", "There is no folder"),
        ("loop", "There is no folder"),
        ("empty", "it has no harvest.json"),
        ("a\0b", "There is no folder"),
        ("x" * 5_000, "There is no folder"),
    ]:
        with pytest.raises(LoadError, match=said):
            Activations.open(f"{tmp_path}/{name}")


def test_a_folder_of_another_version_says_so(folder: Path) -> None:
    told = json.loads((folder / "harvest.json").read_text())
    (folder / "harvest.json").write_text(json.dumps({"format": 2, "new": told}))
    with pytest.raises(LoadError, match="is of version 2, and this Insitu reads 1"):
        Activations.open(folder)


def test_a_description_that_is_too_large_is_not_read(folder: Path) -> None:
    with open(folder / "harvest.json", "r+b") as file:
        file.truncate(2**40)  # a hole: it takes no room on disk
    with pytest.raises(LoadError, match="more than the"):
        Activations.open(folder)
    shutil.rmtree(folder / "shards")
    write_folder(folder.parent / "b", [[3]])
    with open(folder.parent / "b" / "manifest.jsonl", "r+b") as file:
        file.truncate(2**40)
    with pytest.raises(LoadError, match="more than the"):
        Activations.open(folder.parent / "b")


def test_a_file_of_holes_is_not_read_whole(folder: Path) -> None:
    """A shard of a terabyte that is no shard costs its header."""
    path = folder / "shards/00001.safetensors"
    lines = (folder / "manifest.jsonl").read_bytes().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "bytes": 2**40}).encode()
    (folder / "manifest.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with open(path, "r+b") as file:
        file.truncate(2**40)
    assert Activations.open(folder)[LABEL][9].shape == (4,)  # its tensors are where they were
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 2**39))
    with pytest.raises(LoadError, match="header would be longer"):
        Activations.open(folder)[LABEL][9]
