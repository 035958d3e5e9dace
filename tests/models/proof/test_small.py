"""Models on which names are proven are small in what their forwards take, too."""

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BambaConfig, BambaForCausalLM

from insitu.models.proof.small import small_model


def test_chunks_are_no_longer_than_small_prompts_need() -> None:
    """Bamba pads to 256 positions by default, and Transformers 4 took 17 GB for their pairs."""
    config = BambaConfig(num_hidden_layers=2, attn_layer_indices=[1])
    with torch.device("meta"):
        large = BambaForCausalLM(config)
    small = small_model(large, 2, narrow=True)
    assert small.config.mamba_chunk_size <= 16
    ids = torch.tensor([[5, 6, 7]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        expected = small(ids, use_cache=False).logits
    assert counter.get_total_flops() < 2e9
    assert bool(expected.isfinite().all())
