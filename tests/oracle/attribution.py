"""captum as the oracle: what it attributes to tokens is what Insitu does.

Run by `make oracle`, which gives the Python of an environment with captum; it is no part of the
suite.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from insitu import LanguageModel
from insitu.methods import gradient_times_input, integrated_gradients, logit_difference
from tests.oracle.agreement import IDS, MODELS, made
from tests.oracle.peers import ask, write_models

METRIC = logit_difference(3, 9)


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what captum says of each model."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, {name: made(name) for name in MODELS}, IDS)
    ask("INSITU_CAPTUM", "attributions_of_captum.py", folder)
    return folder


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1e-3
    worst = (found - expected).abs().max() / expected.abs().max()
    assert worst < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_captum_attributes_the_same(name: str, told: Path) -> None:
    theirs = load_file(told / name / "attributions.safetensors")
    model = LanguageModel(made(name))
    zero = integrated_gradients(model, IDS[0], METRIC, steps=20)
    assert_same(zero.values, theirs["zero"])
    # It counts what the attributions have too much.
    assert abs(zero.details["difference"] + theirs["gap"][0]) < 1e-4 * theirs["zero"].abs().max()
    token = integrated_gradients(model, IDS[0], METRIC, steps=20, baseline=11)
    assert_same(token.values, theirs["token"])
    assert_same(token.values, theirs["layer"])
    assert_same(gradient_times_input(model, IDS[0], METRIC).values, theirs["gradient"])
