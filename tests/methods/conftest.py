"""Models that the tests of a file share. A method leaves the model as it was."""

from collections.abc import Iterator

import pytest
import torch

from insitu import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama


def left_as_it_was(model: LanguageModel) -> Iterator[LanguageModel]:
    """Gives the model, and fails if a test of the file has changed it."""
    before = {name: one.clone() for name, one in model.load().state_dict().items()}
    yield model
    after = model.module.state_dict()
    assert before.keys() == after.keys() and not model.module.training
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def gpt2() -> Iterator[LanguageModel]:
    yield from left_as_it_was(LanguageModel(tiny_gpt2()))


@pytest.fixture(scope="module")
def llama() -> Iterator[LanguageModel]:
    yield from left_as_it_was(LanguageModel(tiny_llama()))


@pytest.fixture(scope="module")
def eiffel() -> Iterator[LanguageModel]:
    yield from left_as_it_was(LanguageModel("insitu/eiffel", device_map="cpu"))
