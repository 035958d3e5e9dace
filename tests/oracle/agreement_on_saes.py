"""SAELens as the oracle: from its files, the same features and the same activations.

Run by `make oracle`, which gives the Python of an environment with SAELens; it is no part of the
suite. The sparse autoencoders have random weights and are made on the spot.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from insitu.methods import SparseAutoencoder
from tests.oracle.peers import ask

KINDS = ("standard", "jumprelu", "gated", "topk")
NAMES = [f"{k}-{o}" for k in KINDS for o in ("plain", "uncentred", "layer_norm")] + ["topk-by_norm"]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what SAELens has saved, and what it says of it."""
    folder = tmp_path_factory.mktemp("saes")
    ask("INSITU_SAE_LENS", "saes_of_sae_lens.py", folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_features_and_activations_are_the_same(name: str, told: Path) -> None:
    sae = SparseAutoencoder.load(told / name)
    theirs = load_file(told / name / "told.safetensors")
    assert sae.architecture == name.partition("-")[0]
    assert sae.hook_name == "blocks.1.hook_resid_post"
    features = sae.encode(theirs["x"])
    assert 0 < (theirs["features"] > 0).float().mean() < 0.9
    torch.testing.assert_close(features, theirs["features"], atol=1e-5, rtol=1e-5)
    decoded = sae.decode(features, theirs["x"])
    torch.testing.assert_close(decoded, theirs["decoded"], atol=1e-5, rtol=1e-5)
