"""A small model that servers of tests have, and jobs for it."""

from pathlib import Path

import pytest

from tests.server.samples import Sample, samples, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model."""
    folder = tmp_path_factory.mktemp("served") / "model"
    small_model(folder)
    return folder


@pytest.fixture(scope="module")
def jobs(model: Path) -> list[Sample]:
    """Jobs of all kinds, one of each."""
    return samples(model, 1)


@pytest.fixture(scope="module")
def job(jobs: list[Sample]) -> Sample:
    """A job that reads values."""
    return jobs[0]
