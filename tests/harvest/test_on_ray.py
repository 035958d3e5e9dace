"""A harvest on actors of Ray is the same folder, also when actors are killed."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from insitu import LanguageModel
from insitu.graph.errors import MissingPackageError
from insitu.harvest import harvest
from tests.conftest import tiny_gpt2
from tests.harvest.folders import files, manifest
from tests.harvest.test_going_on import SITE, documents, run


def test_ray_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "insitu\[cluster\]"'):
        harvest(LanguageModel(tiny_gpt2()), documents(), SITE, to=tmp_path, on="ray")


def actors() -> list[int]:
    """The processes that actors of this process's Ray live in."""
    below = psutil.Process().children(recursive=True)
    return [one.pid for one in below if "_Worker" in " ".join(one.cmdline())]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_actors_of_which_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr("insitu.harvest.progress._EVERY", 0)
    killed: list[int] = []

    def kill_one(now: object) -> None:
        if not killed:
            killed.append(actors()[0])
            os.kill(killed[0], signal.SIGKILL)

    run(tmp_path / "ray", on="ray:2", progress=kill_one)
    run(tmp_path / "here")
    assert killed
    assert manifest(tmp_path / "ray") == manifest(tmp_path / "here")
    # What a killed actor was writing is left, and removed by the next one that goes on.
    run(tmp_path / "ray")
    assert files(tmp_path / "ray") == files(tmp_path / "here")
