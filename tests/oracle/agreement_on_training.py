"""Trainers of others as the oracle: from a folder of activations they learn as from their own.

Run by `make oracle`, which gives the Python of an environment for each; it is no part of the suite.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.oracle.activations_folder import write_training_folder
from tests.oracle.peers import ask

STEPS = 200
Losses = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Losses]:
    """Asks a peer for the losses of each training."""
    folder = tmp_path_factory.mktemp("training")
    write_training_folder(folder)
    return lambda variable, name: asked(folder, variable, name)


def asked(folder: Path, variable: str, name: str) -> Losses:
    ask(variable, f"trained_by_{name}.py", folder)
    losses = load_file(folder / f"{name}.safetensors")
    assert all(len(one) == STEPS and one.isfinite().all() for one in losses.values())
    return losses


def check_alike(own: torch.Tensor, other: torch.Tensor, falls: float) -> None:
    """Both begin at the same loss, fall to a part of it, and are never far from each other."""
    for losses in (own, other):
        assert losses[-20:].mean() < falls * losses[:3].mean()
    own, other = (losses.unfold(0, 10, 10).mean(-1) for losses in (own, other))
    assert abs(own[0] / other[0] - 1) < 0.05
    assert ((own / other).log().abs() < 0.5).all()


def test_sae_lens(told: Callable[[str, str], Losses]) -> None:
    losses = told("INSITU_SAE_LENS", "sae_lens")
    check_alike(losses["own"], losses["folder"], 0.1)
    # Of the data set that is written for it, its store makes the very same batches.
    torch.testing.assert_close(losses["arrow"], losses["own"], rtol=1e-3, atol=1e-3)


def test_dictionary_learning(told: Callable[[str, str], Losses]) -> None:
    losses = told("INSITU_DICTIONARY_LEARNING", "dictionary_learning")
    check_alike(losses["own"], losses["folder"], 0.1)


def test_sparsify(told: Callable[[str, str], Losses]) -> None:
    losses = told("INSITU_EAI_SPARSIFY", "sparsify")
    check_alike(losses["own"], losses["folder"], 0.7)
