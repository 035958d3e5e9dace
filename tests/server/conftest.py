"""A small model that servers of tests have, and jobs for it; and a server with the bundled one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from insitu import LanguageModel, serve
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


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where a server has the bundled model."""
    with serve("insitu/eiffel") as server:
        yield server.url


@pytest.fixture
def there(url: str) -> LanguageModel:
    """The bundled model on that server."""
    return LanguageModel("insitu/eiffel", remote=url)
