"""What methods found, as a notebook shows it where it is the last line of a cell."""

from collections.abc import Callable

import pytest
import torch

from insitu import LanguageModel
from insitu.methods import (
    Alignment,
    Axis,
    Circuit,
    Edge,
    Probe,
    Probes,
    Result,
    SparseAutoencoder,
    TunedLens,
    steering_vector,
)

SCORES = Result("Probe", "accuracy", torch.tensor([0.5, 1.0]), (Axis.of("layer", (1, 2)),))
MAPS = torch.zeros(2, 1, 16), torch.zeros(2, 1)
SAE_WEIGHTS = {"W_enc": torch.zeros(16, 40), "W_dec": torch.zeros(40, 16), "b_dec": torch.zeros(16)}

FOUND: dict[str, tuple[Callable[[LanguageModel], object], str]] = {
    "a lens": (TunedLens.untrained, "<Tuned lens: layer 4 x width 16, untrained>"),
    "a trained lens": (
        lambda _: TunedLens(torch.zeros(2, 3, 3), torch.zeros(2, 3), torch.zeros(7, 2)),
        "<Tuned lens: layer 2 x width 3, 7 steps of training>",
    ),
    "a vector": (
        lambda model: steering_vector(model, [[3, 4, 5]], [[6, 7]], layers=[1, 3]),
        "<Steering vector of residual_out: difference of means, layers 1, 3, width 16>",
    ),
    "a probe": (
        lambda _: Probe("logistic", "post", (1, 2), -1, (0, 1), *MAPS, SCORES),
        "<Probe: accuracy, layer 2, from 0.5 to 1>",
    ),
    "probes": (lambda _: Probes((), SCORES), "<Probe: accuracy, layer 2, from 0.5 to 1>"),
    "a circuit": (
        lambda _: Circuit("By hand", "logits", (Edge("m0", "logits", 1.0),) * 2),
        "<By hand: logits, 2 edges>",
    ),
    "an alignment": (
        lambda _: Alignment("mlp_out", 2, -1, -1, torch.eye(3)[:2], 0.5, 1.0, SCORES),
        "<Alignment of mlp_out, layer 2: directions 2, accuracy 0.5 held out, 1 in training>",
    ),
    "an alignment of all directions": (
        lambda _: Alignment("mlp_out", 2, -1, -1, None, 0.25, 1.0, SCORES),
        "<Alignment of mlp_out, layer 2: directions all, accuracy 0.25 held out, 1 in training>",
    ),
    "a sparse autoencoder": (
        lambda _: SparseAutoencoder(
            "topk", SAE_WEIGHTS, "blocks.1.hook_resid_post", False, "none", 3, False, {}
        ),
        "<Sparse autoencoder of blocks.1.hook_resid_post: topk, 40 features of width 16>",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_it_is_told_in_a_line_without_its_tensors(gpt2: LanguageModel, name: str) -> None:
    make, said = FOUND[name]
    assert repr(make(gpt2)) == said
