"""The key of a server of one's own is found, and that of others is not used."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from insitu import LoadError, OptionError
from insitu.remote.addresses import Address
from insitu.remote.cache_folder import cache_folder
from insitu.remote.key_files import forget_key, key_file, read_key, write_key

HERE = Address.of("http://127.0.0.1:8123")
ELSEWHERE = Address.of("https://lab.example:8123")


def test_a_key_is_written_for_its_user_alone_and_found() -> None:
    assert read_key(8123) is None
    before = os.umask(0)
    try:
        path = write_key(8123, "first")
    finally:
        os.umask(before)
    assert path == key_file(8123)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    write_key(8123, "second")
    assert read_key(8123) == "second" and read_key(8124) is None
    assert os.listdir(path.parent) == [path.name]


def test_a_server_that_ends_takes_its_own_key_with_it() -> None:
    write_key(8123, "first")
    write_key(8123, "of the next server")
    forget_key(8123, "first")
    assert read_key(8123) == "of the next server"
    forget_key(8123, "of the next server")
    assert read_key(8123) is None
    forget_key(8123, "of the next server")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o620])
def test_a_file_that_others_have_access_to_is_refused(mode: int) -> None:
    path = write_key(8123, "secret-key")
    path.chmod(mode)
    with pytest.raises(LoadError, match="chmod 600") as caught:
        HERE.key(None)
    assert "secret-key" not in str(caught.value)
    assert read_key(8124) is None


def test_a_folder_that_others_have_access_to_is_refused() -> None:
    path = write_key(8123, "key")
    path.parent.chmod(0o755)
    with pytest.raises(LoadError, match="chmod 700"):
        read_key(8123)
    with pytest.raises(LoadError, match="chmod 700"):
        write_key(8123, "key")


def test_another_users_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(8123, "key")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(LoadError, match="another user's"):
        read_key(8123)


def test_a_link_a_folder_and_a_pipe_are_refused(tmp_path: Path) -> None:
    path = write_key(8123, "key")
    path.rename(tmp_path / "key")
    path.symlink_to(tmp_path / "key")
    with pytest.raises(LoadError):
        read_key(8123)
    path.unlink()
    path.mkdir(mode=0o700)
    with pytest.raises(LoadError):
        read_key(8123)
    path.rmdir()
    os.mkfifo(path, 0o600)
    with pytest.raises(LoadError, match="is no file"):
        read_key(8123)


def test_a_key_of_other_signs_is_none() -> None:
    path = write_key(8123, "key")
    for content in (b"two words\n", b"a\nInjected: header\n", b"x" * 2000):
        path.write_bytes(content)
        with pytest.raises(OptionError, match="is no key"):
            HERE.key(None)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LoadError, match="cannot be read"):
        HERE.key(None)
    for given in ("", "a b", "é", "a\r\nb"):
        with pytest.raises(OptionError, match="`key=` is no key"):
            HERE.key(given)


def test_the_given_key_goes_before_the_environments_and_that_before_the_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_key(8123, "of-the-file")
    assert HERE.key(None)[0] == "of-the-file"
    assert ELSEWHERE.key(None) == (None, "none: give `key=`, or set `INSITU_KEY`")
    monkeypatch.setenv("INSITU_KEY", "of-the-environment")
    assert HERE.key(None)[0] == ELSEWHERE.key(None)[0] == "of-the-environment"
    assert HERE.key("given")[0] == "given"
    monkeypatch.setenv("INSITU_KEY", "two words")
    with pytest.raises(OptionError, match="`INSITU_KEY` is no key"):
        HERE.key(None)


def test_machines_that_share_a_home_do_not_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    write_key(8123, "key")
    monkeypatch.setattr("platform.node", lambda: "another/../machine")
    assert key_file(8123).parent.name == "servers"
    assert read_key(8123) is None


def test_a_user_without_a_home_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")

    def none() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", none)
    assert cache_folder("servers") is None and read_key(8123) is None
    with pytest.raises(LoadError, match="no home"):
        write_key(8123, "key")


GOOD = {
    "http://127.0.0.1:8000/": ("http://127.0.0.1:8000", True, 8000),
    "http://localhost": ("http://localhost", True, 80),
    "http://[::1]:81": ("http://[::1]:81", True, 81),
    "http://127.8.9.1": ("http://127.8.9.1", True, 80),
    "https://lab.example/insitu/": ("https://lab.example/insitu", False, 443),
    "https://127.0.0.1.evil.example": ("https://127.0.0.1.evil.example", False, 443),
}


@pytest.mark.parametrize("url", GOOD)
def test_an_address_is_understood(url: str) -> None:
    assert Address.of(url) == Address(*GOOD[url])


BAD: list[Any] = [
    *("127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "https://u:secret@host"),
    *("https://host?key=secret", "https://host/#secret", "", 8000, None, "http://[::1"),
]


@pytest.mark.parametrize("url", BAD)
def test_what_is_no_address_is_refused_and_no_secret_is_shown(url: Any) -> None:
    with pytest.raises(OptionError, match=r"http://127\.0\.0\.1:8000") as caught:
        Address.of(url)
    assert "secret" not in str(caught.value)


def test_another_machine_without_tls_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="without TLS"):
        assert not Address.of("http://lab.example").is_here


def test_an_address_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="INSITU_REMOTE"):
        Address.given_or_set(None)
    monkeypatch.setenv("INSITU_REMOTE", "http://127.0.0.1:7")
    assert Address.given_or_set(None).port == 7
    assert Address.given_or_set("http://127.0.0.1:8").port == 8
