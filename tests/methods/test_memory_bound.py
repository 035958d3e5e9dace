"""`max_tokens_per_pass`: methods take more passes of fewer tokens, and find the same."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from insitu import LanguageModel
from insitu.methods import (
    Edge,
    SparseAutoencoder,
    SteeringVector,
    ablate,
    activation_patching,
    attention_patterns,
    attribution_patching,
    causal_tracing,
    completeness_curve,
    direct_logit_attribution,
    discover_circuit,
    distributed_alignment_search,
    edge_attribution,
    faithfulness_curve,
    gradient_times_input,
    head_scores,
    integrated_gradients,
    logit_difference,
    logit_lens,
    path_patching,
    probe,
    run_circuit,
    sae_features,
    steer,
    steering_vector,
    train_tuned_lens,
    tuned_lens,
)
from insitu.methods.circuit import Circuit
from insitu.methods.tuned_lens import TunedLens
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire

CLEAN = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4]]
CORRUPTED = [[3, 1, 7, 1, 5], [9, 2, 8, 5, 3], [5, 8, 3, 7, 9], [3, 2, 6, 8, 4]]
PAIRS = (CLEAN, CORRUPTED, logit_difference(3, 4))
MANY = [[number, number + 1, 3] for number in range(16)]
LABELS = [number % 2 for number in range(16)]
VECTOR = SteeringVector("residual_out", (1,), torch.ones(1, 8))
CIRCUIT = Circuit("by hand", "", (Edge("input", "logits", 2.0), Edge("m0", "logits", 1.0)))
SAE = SparseAutoencoder(
    "standard",
    {
        "W_enc": torch.eye(8), "W_dec": torch.eye(8),
        "b_enc": torch.zeros(8), "b_dec": torch.zeros(8),
    },
    "blocks.1.hook_resid_post", False, "none", 0, False, {},
)  # fmt: skip

LARGER = {
    # A step of the optimiser, of 12 pairs.
    "distributed_alignment_search": 36,
    # Each call finds out what the parts of the model are, on so few rows of at most 8 tokens.
    **dict.fromkeys(("discover_circuit", "edge_attribution"), 30),
    **dict.fromkeys(("completeness_curve", "faithfulness_curve", "run_circuit"), 15),
}
"""Of some methods, the most tokens that a pass has however few are asked for."""

Call = Callable[..., Any]
CALLS: Mapping[str, Call] = {
    "ablate": lambda m, **k: ablate(m, *PAIRS[::2], method="mean", **k).values,
    "activation_patching": lambda m, **k: activation_patching(m, *PAIRS, **k).values,
    "attention_patterns": lambda m, **k: attention_patterns(m, CLEAN, **k).values,
    "attribution_patching": lambda m, **k: attribution_patching(m, *PAIRS, **k).values,
    "causal_tracing": lambda m, **k: causal_tracing(
        m, CLEAN[0], [0], 4, noise=1.0, samples=4, sites="mlp_out", **k
    ).values,
    "completeness_curve": lambda m, **k: completeness_curve(m, *PAIRS, CIRCUIT, **k).values,
    "direct_logit_attribution": lambda m, **k: direct_logit_attribution(m, CLEAN, 3, **k).values,
    "discover_circuit": lambda m, **k: torch.tensor(
        [edge.score for edge in discover_circuit(m, *PAIRS, edges=9, **k).edges]
    ),
    "distributed_alignment_search": lambda m, **k: distributed_alignment_search(
        m, MANY, MANY[::-1], LABELS, layer=1, epochs=1, **k
    ).rotation,
    "edge_attribution": lambda m, **k: edge_attribution(
        m, *PAIRS, steps=4, **k
    ).values.nan_to_num(),
    "faithfulness_curve": lambda m, **k: faithfulness_curve(m, *PAIRS, CIRCUIT, **k).values,
    "gradient_times_input": lambda m, **k: gradient_times_input(m, *PAIRS[::2], **k).values,
    "head_scores": lambda m, **k: head_scores(m, length=4, **k).values,
    "integrated_gradients": lambda m, **k: integrated_gradients(
        m, CLEAN[0], PAIRS[2], steps=8, **k
    ).values,
    "logit_lens": lambda m, **k: logit_lens(m, CLEAN, **k).values,
    "path_patching": lambda m, **k: path_patching(m, *PAIRS, **k).values,
    "probe": lambda m, **k: probe(m, MANY, LABELS, method="linear", **k).scores.values,
    "run_circuit": lambda m, **k: run_circuit(m, *PAIRS, CIRCUIT, **k).values,
    "sae_features": lambda m, **k: sae_features(m, CLEAN, SAE, top=3, **k).values,
    "steer": lambda m, **k: torch.stack(
        [one.ids for one in steer(m, CLEAN, VECTOR, strengths=[0, 1], max_new_tokens=3, **k)]
    ),
    "steering_vector": lambda m, **k: steering_vector(m, CLEAN, CORRUPTED, **k).vectors,
    "train_tuned_lens": lambda m, **k: train_tuned_lens(m, MANY, epochs=1, **k).losses,
    "tuned_lens": lambda m, **k: tuned_lens(m, CLEAN, TunedLens.untrained(m), **k).values,
}  # fmt: skip


class Counting(nn.LayerNorm):
    """A norm that keeps how many tokens it is given at once: a hook would keep prompts apart."""

    seen: ClassVar[list[int]] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not isinstance(input, FakeTensor):
            self.seen.append(input.shape[:-1].numel())
        return super().forward(input)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=8, n_layer=2, n_head=2, eos_token_id=None
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module = transformers.GPT2LMHeadModel(config)
    for block in module.transformer.h:
        block.ln_1 = Counting(8)
    return LanguageModel(module.eval())


def largest(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives, and the most tokens that go through a block at once in it."""
    Counting.seen.clear()
    return call(), max(Counting.seen)


OF_CIRCUITS = (
    *("discover_circuit", "edge_attribution", "faithfulness_curve", "completeness_curve"),
    *("path_patching", "run_circuit"),
)
DEAR = (*OF_CIRCUITS, "ablate", "activation_patching")


@pytest.mark.parametrize("name", sampled(CALLS, [name for name in CALLS if name not in DEAR]))
def test_a_pass_has_no_more_tokens_and_gives_the_same(tiny: LanguageModel, name: str) -> None:
    if name == "probe":
        pytest.importorskip("sklearn")
    call = CALLS[name]
    call(tiny, max_tokens_per_pass=8)  # what is tried once on a model is tried here
    free, most = largest(lambda: call(tiny))
    found, fewer = largest(lambda: call(tiny, max_tokens_per_pass=8))
    torch.testing.assert_close(found, free, atol=1e-4, rtol=1e-4)
    assert fewer <= LARGER.get(name, 8) < most


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_number_of_tokens_is_refused(tiny: LanguageModel, name: str) -> None:
    from insitu import OptionError

    for wrong in (0, True, 2.5):
        with pytest.raises(OptionError, match="max_tokens_per_pass"):
            CALLS[name](tiny, max_tokens_per_pass=wrong)
