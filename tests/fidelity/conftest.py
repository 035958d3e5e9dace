"""Models for tests of what runs share."""

import pytest

from insitu import LanguageModel
from tests.fidelity.alone import kept, make


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """One that tests share and leave as it is."""
    return kept(request.param)


@pytest.fixture(params=["gpt2", "llama"])
def own_model(request: pytest.FixtureRequest) -> LanguageModel:
    """One that a test may change."""
    return make(request.param)
