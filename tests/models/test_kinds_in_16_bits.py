"""What runs in 16 bits is of the kind that it is of in 32, so the same proofs are about it."""

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)

from insitu import LanguageModel
from tests.thinning import sampled

_SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100),
    "llama": LlamaConfig(**_SMALL, **_HEADS),
    "gemma2": Gemma2Config(**_SMALL, **_HEADS, head_dim=16),
    "qwen3": Qwen3Config(**_SMALL, **_HEADS, head_dim=16),
}


@pytest.mark.parametrize("config", sampled(CONFIGS.values(), [CONFIGS["gpt2"]]), ids=CONFIGS)
@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float16], [torch.bfloat16]))
def test_names_are_there_before_the_weights(
    config: PretrainedConfig, dtype: torch.dtype, tmp_path
) -> None:
    Auto.from_config(config).to(dtype).save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, dtype=dtype)
    ids = torch.arange(5)[None]
    with model.scan(ids):
        block = model.blocks[1]
        z, q, residual = block.attention.z.save(), block.attention.q.save(), block.residual_out
        kept = residual.save()
    assert not model.loaded
    assert (z.dtype, q.dtype, kept.dtype) == (dtype, dtype, dtype)
    model.load()
    with model.trace(ids):
        loaded = model.blocks[1].attention.z.save()
    assert loaded.shape == z.shape
