import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from insitu import LoadError, OptionError
from insitu.methods import files
from insitu.methods.files import Tensors, write

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def read(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    return files.read(path, kind, Any, lambda told, tensors: (tensors.rest(""), told))


def test_tensors_and_what_is_told_come_back(tmp_path: Path) -> None:
    write(tmp_path / "file", "probe", TENSORS, {"layer": 3, "names": ["x", "é"]})
    tensors, told = read(tmp_path / "file", "probe")
    assert told == {"layer": 3, "names": ["x", "é"]}
    assert {name: value.dtype for name, value in tensors.items()} == {
        "a": torch.float32,
        "b": torch.int64,
    }
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_tensors_that_share_memory_or_lie_otherwise_are_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0).reshape(2, 3)
    write(tmp_path / "file", "probe", {"whole": whole, "turned": whole.T}, None)
    assert torch.equal(read(tmp_path / "file", "probe")[0]["turned"], whole.T)


def test_others_may_read_a_file_as_the_umask_says(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write(tmp_path / "file", "probe", TENSORS, None)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no folder '.*/none'"):
        write(tmp_path / "none" / "file", "probe", TENSORS, None)


def test_another_kind_is_refused_and_named(tmp_path: Path) -> None:
    write(tmp_path / "file", "probe", TENSORS, None)
    with pytest.raises(LoadError, match="holds no result, but probe"):
        read(tmp_path / "file", "result")
    save_file(TENSORS, tmp_path / "other")
    with pytest.raises(LoadError, match="something of another library"):
        read(tmp_path / "other", "result")


def test_a_file_that_is_not_there_or_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        read(tmp_path / "none", "probe")
    write(tmp_path / "file", "probe", TENSORS, None)
    data = (tmp_path / "file").read_bytes()
    for size in (0, 4, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(LoadError, match="cannot be read"):
            read(tmp_path / "cut", "probe")


def test_another_version_is_refused(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("insitu.methods.files._VERSION", 99)
        write(tmp_path / "file", "probe", TENSORS, None)
    with pytest.raises(LoadError, match="of version 99, and this is 1"):
        read(tmp_path / "file", "probe")


def test_what_cannot_be_written_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "file", "probe", TENSORS, "old")
    with pytest.raises(TypeError):
        write(tmp_path / "file", "probe", TENSORS, object())
    with pytest.raises(Exception):  # noqa: B017 - whatever safetensors raises of such a dtype
        write(tmp_path / "file", "probe", {"a": torch.zeros(2).to_sparse()}, "new")
    assert read(tmp_path / "file", "probe")[1] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_is_broken_off_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "file", "probe", TENSORS, "old")

    def broken(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", "probe", TENSORS, "new")
    assert read(tmp_path / "file", "probe")[1] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_axes_of_one_name_have_one_length() -> None:
    tensors = Tensors({"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(3, 3)})
    assert tensors.take("a", "layer width").shape == (2, 3)
    with pytest.raises(LoadError, match=r"'b' of shape \(4,\) .* \(width\) with width 3"):
        tensors.take("b", "width")
    assert tensors.take("c", "width width").shape == (3, 3)
    with pytest.raises(LoadError, match="no tensor 'd'"):
        tensors.take("d", "...")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_dtypes_that_cannot_be_used_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(LoadError, match=str(dtype)):
        Tensors({"a": torch.zeros(2).to(dtype)}).take("a", "width")


def test_headers_that_are_too_long_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(LoadError, match="header"):
        read(tmp_path / "file", "probe")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoadError, match="pipe"):
        read(tmp_path / "pipe", "probe")
