import os
import stat
import threading
from pathlib import Path

import pytest

from insitu import LoadError, OptionError, SaveError
from insitu.disk import check_readable, check_target, read, write

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("content", [b"\x00\xff", "é\n", b""])
def test_what_is_written_is_read(content: bytes | str, tmp_path: Path) -> None:
    write(tmp_path / "file", content)
    expected = content.encode() if isinstance(content, str) else content
    assert read(tmp_path / "file") == expected == read(str(tmp_path / "file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kept", [0o600, 0o640, 0o664, 0o777])
def test_the_mode_of_a_file_is_kept(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(kept)
    write(path, b"new")
    assert mode(path) == kept and path.read_bytes() == b"new"


def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o640


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    path.chmod(0o600)
    seen = []
    fsync = os.fsync

    def looking(number: int) -> None:
        seen.extend(mode(one) for one in tmp_path.iterdir())
        fsync(number)

    monkeypatch.setattr(os, "fsync", looking)
    write(path, b"secret")
    assert seen == [0o600, 0o600]


def test_links_stay_and_their_targets_are_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("folder") / "file")
    (tmp_path / "second").symlink_to("link")
    write(tmp_path / "second", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "second").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to(tmp_path / "folder" / "made")
    write(tmp_path / "dangling", b"made")
    assert (tmp_path / "folder" / "made").read_bytes() == b"made"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((SaveError, OptionError)):
        write(tmp_path / "a", b"")
    with pytest.raises(LoadError, match="cannot be read"):
        read(tmp_path / "a")


def test_pipes_and_devices_are_written_into(tmp_path: Path) -> None:
    write(os.devnull, b"gone")
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write(tmp_path / "pipe", b"through")
    reader.join(10)
    assert found == [b"through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255), b"x")
    with pytest.raises(SaveError, match="cannot be written"):
        write(tmp_path / ("n" * 256), b"x")


def test_what_cannot_be_written_is_said_before(tmp_path: Path) -> None:
    for check in (check_target, lambda path: write(path, b"")):
        with pytest.raises(OptionError, match="no folder '.*none'"):
            check(tmp_path / "none" / "file")
        with pytest.raises(OptionError, match="is a folder"):
            check(tmp_path)
        with pytest.raises(SaveError, match="null byte"):
            check("a\0b")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OptionError, match="no folder"):
        check_target(tmp_path / "file" / "in it")
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_no_other(
    error: BaseException, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def failing(number: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", failing)
    expected = SaveError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write(tmp_path / "file", b"new")
    if expected is SaveError:
        assert "No space left on device" in str(caught.value) and "file" in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_files_that_are_read_only_are_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    if AS_ROOT:  # who may do anything
        access = os.access
        monkeypatch.setattr(
            os,
            "access",
            lambda path, how: access(path, how) and bool(os.stat(path).st_mode & 0o222),
        )
    with pytest.raises(SaveError, match="read-only"):
        write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reading in (read, check_readable):
        with pytest.raises(LoadError, match="a folder"):
            reading(tmp_path)
        with pytest.raises(LoadError, match="a pipe or a device"):
            reading(tmp_path / "pipe")
        with pytest.raises(LoadError, match="a pipe or a device"):
            reading("/dev/zero")
        with pytest.raises(LoadError, match="No such file"):
            reading(tmp_path / "none")
        with pytest.raises(LoadError, match="null byte"):
            reading("a\0b")


def test_files_that_are_too_large_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read(tmp_path / "file", 5) == b"12345"
    with pytest.raises(LoadError, match="5 bytes, more than the 4"):
        read(tmp_path / "file", 4)
