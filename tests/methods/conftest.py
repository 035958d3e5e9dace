"""Models that the tests of a file share. A method leaves the model as it was."""

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from insitu import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama


def left_as_it_was(make: Callable[[], PreTrainedModel]) -> Iterator[LanguageModel]:
    """Gives the model, and fails if a test of the file has changed it."""
    model = LanguageModel(make())
    yield model
    before, after = make().state_dict(), model.module.state_dict()
    assert before.keys() == after.keys() and not model.module.training
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def gpt2() -> Iterator[LanguageModel]:
    yield from left_as_it_was(tiny_gpt2)


@pytest.fixture(scope="module")
def llama() -> Iterator[LanguageModel]:
    yield from left_as_it_was(tiny_llama)


@pytest.fixture(scope="module")
def eiffel() -> LanguageModel:
    return LanguageModel("insitu/eiffel", device_map="cpu")
