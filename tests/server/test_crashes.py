import os
import random
from pathlib import Path

import pytest

from tests.server.crashes import Crashes
from tests.server.killed_server import Kind
from tests.server.samples import Sample, samples

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes in /proc")


@pytest.fixture(scope="module")
def jobs(model: Path) -> list[Sample]:
    return samples(model)


@pytest.mark.thorough
def test_each_job_ends_once_whatever_is_killed(
    tmp_path: Path, model: Path, jobs: list[Sample]
) -> None:
    kills: list[Kind] = [
        "worker", "engine", "worker", "front", "worker", "engine", "worker", "all", "worker",
        "template",
    ]  # fmt: skip
    report = Crashes(tmp_path, model, jobs).run(60, kills)
    assert report.ends.total() >= 60 and report.ends["failed"] <= 3
    assert report.kills.total() == len(kills)


@pytest.mark.slow
def test_each_job_ends_once_through_hundreds_of_kills(
    tmp_path: Path, model: Path, jobs: list[Sample]
) -> None:
    # All of it takes hours: a part has fewer of both, and another seed.
    kills = int(os.environ.get("INSITU_KILLS", "300"))
    count = int(os.environ.get("INSITU_JOBS", "2000"))
    seed = int(os.environ.get("INSITU_SEED", "0"))
    weights: dict[Kind, int] = {"front": 20, "engine": 30, "template": 8, "worker": 27, "all": 15}
    chosen = random.Random(seed).choices([*weights], [*weights.values()], k=kills)
    report = Crashes(tmp_path, model, jobs, seed=seed).run(count, chosen)
    print(report)
    assert report.ends.total() >= count
    assert report.kills.total() == kills
    assert report.ends["failed"] <= count / 10
