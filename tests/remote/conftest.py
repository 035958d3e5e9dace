"""A home of its own, and a clock that waits for nobody, for every test of a client."""

from __future__ import annotations

from pathlib import Path

import pytest

from insitu import Job, LanguageModel
from insitu.remote import retrying
from insitu.remote.remote_job import RemoteJob
from tests.conftest import tiny_gpt2
from tests.remote.fake_server import FakeServer
from tests.remote.jobs import job_of


class Clock:
    """Counts the seconds that would have been waited."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def now(self) -> float:
        return sum(self.waited)

    def pause(self, seconds: float) -> None:
        self.waited.append(seconds)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("INSITU_KEY", raising=False)
    monkeypatch.delenv("INSITU_REMOTE", raising=False)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(retrying, "now", found.now)
    monkeypatch.setattr(retrying, "pause", found.pause)
    return found


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


@pytest.fixture(scope="session")
def job(model: LanguageModel) -> Job:
    return job_of(model)


@pytest.fixture
def server(model: LanguageModel) -> FakeServer:
    return FakeServer(model)


@pytest.fixture
def queued(server: FakeServer) -> RemoteJob:
    """A job that the server has taken, and runs when it is told to."""
    server.holds = True
    assert server.model is not None
    return server.connection().submit(job_of(server.model))
