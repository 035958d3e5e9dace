"""Skeletons are kept where they are found again, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from insitu import LanguageModel, RemoteError, SaveError
from insitu.remote.protocol import Skeleton
from insitu.remote.skeletons import (
    cached_skeleton,
    digest_of,
    keep_skeleton,
    skeleton_folder,
    skeleton_from_bytes,
    skeleton_of,
    skeleton_to_bytes,
)
from tests.conftest import tiny_llama
from tests.remote.fake_server import FakeServer, Pieces, record

pytestmark = pytest.mark.no_wire
CONFIG = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}).encode()


class TestFolders:
    @pytest.fixture
    def skeleton(self) -> Skeleton:
        return Skeleton("m", {"config.json": CONFIG, "merges.txt": b"a b"}, "float32")

    def test_are_written_once(self, skeleton: Skeleton, home: Path) -> None:
        folder = skeleton_folder(skeleton)
        assert folder.parent == home / "insitu" / "skeletons"
        assert folder.parent.stat().st_mode & 0o077 == 0
        before = (folder / "config.json").stat().st_mtime_ns
        assert skeleton_folder(skeleton) == folder
        assert (folder / "config.json").stat().st_mtime_ns == before
        assert os.listdir(folder.parent) == [folder.name]
        other = Skeleton("m", {**skeleton.files, "merges.txt": b"c d"}, "float32")
        assert skeleton_folder(other) != folder
        assert skeleton_folder(msgspec.structs.replace(skeleton, dtype="float16")) != folder

    @pytest.mark.parametrize("damage", ["missing", "other", "more", "empty", "a file"])
    def test_that_are_damaged_are_written_again(self, skeleton: Skeleton, damage: str) -> None:
        folder = skeleton_folder(skeleton)
        if damage == "missing":
            (folder / "merges.txt").unlink()
        elif damage == "other":
            (folder / "merges.txt").write_text("c d")
        elif damage == "more":
            (folder / "modeling.py").write_text("raise SystemExit")
        else:
            for file in folder.iterdir():
                file.unlink()
            if damage == "a file":
                folder.rmdir()
                folder.write_text("")
        assert skeleton_folder(skeleton) == folder
        assert sorted(os.listdir(folder)) == ["config.json", "merges.txt"]
        assert (folder / "merges.txt").read_text() == "a b"
        assert os.listdir(folder.parent) == [folder.name]

    def test_of_a_write_that_fails_are_not_there(
        self, skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(SaveError, match="No space left"):
            skeleton_folder(skeleton, tmp_path)
        assert os.listdir(tmp_path) == []

    def test_are_temporary_where_there_is_no_home(
        self, skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        folder = skeleton_folder(skeleton)
        assert (folder / "config.json").exists() and "insitu-skeletons-" in str(folder)
        assert folder.parent.stat().st_mode & 0o077 == 0


class TestOfAConnection:
    def test_are_fetched_once(self, server: FakeServer) -> None:
        first = server.connection().skeleton("tiny")
        assert first == skeleton_of(server.model, "tiny")  # pyright: ignore[reportArgumentType]
        assert server.connection().skeleton() == first
        assert server.asked == ["GET /v1/models", "GET /v1/models/tiny/skeleton", "GET /v1/models"]

    def test_of_another_model_are_fetched_anew(self, server: FakeServer) -> None:
        first = server.connection().skeleton("tiny")
        server.model = LanguageModel(tiny_llama())
        assert server.connection().skeleton("tiny") != first

    def test_of_models_that_are_not_there_are_an_error(self, server: FakeServer) -> None:
        with pytest.raises(RemoteError, match=r"no model 'tinny' \(nearest: 'tiny'\)") as caught:
            server.connection().skeleton("tinny")
        assert caught.value.code == "not_found"
        server.fault = lambda _: record({"models": [], "version": "0.1"})
        with pytest.raises(RemoteError, match="no one model. Its models: none"):
            server.connection().skeleton()

    def test_that_are_none_are_refused_and_not_kept(self, server: FakeServer, home: Path) -> None:
        for body in (b"", b"\xff" * 100, msgspec.msgpack.encode({"model": "m"})):
            server.fault = lambda r, body=body: (
                httpx.Response(200, stream=Pieces(body, 10)) if "skeleton" in r.url.path else None
            )
            with pytest.raises(RemoteError, match="a skeleton that is none") as caught:
                server.connection().skeleton()
            assert caught.value.code == "protocol"
        other = skeleton_to_bytes(Skeleton("m", {"config.json": CONFIG}, "float32"))
        server.fault = lambda r: (
            httpx.Response(200, stream=Pieces(other, 10)) if "skeleton" in r.url.path else None
        )
        with pytest.raises(RemoteError, match="what its digest says"):
            server.connection().skeleton()
        assert not (home / "insitu" / "skeletons").exists() or not os.listdir(
            home / "insitu" / "skeletons"
        )

    def test_in_the_cache_are_what_their_digest_says(self, home: Path) -> None:
        data = skeleton_to_bytes(Skeleton("m", {"config.json": CONFIG}, "float32"))
        keep_skeleton(data)
        path = home / "insitu" / "skeletons" / f"{digest_of(data)}.msgpack"
        assert cached_skeleton(digest_of(data)) == skeleton_from_bytes(data)
        path.write_bytes(data + b"x")
        assert cached_skeleton(digest_of(data)) is None
        for digest in ("", "../" + "0" * 61, "0" * 64):
            assert cached_skeleton(digest) is None
