"""Small models with random weights, one of each kind of architecture.

They are wrapped, and are what most tests of fidelity run on. All architectures are in `zoo`.
"""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from insitu import LanguageModel
from tests.conftest import tiny_gpt2, tiny_llama
from tests.fidelity.zoo import VOCABULARY, spread_out

__all__ = ["GENERATING", "MAKERS", "VOCABULARY", "make", "spread_out", "tiny_mixtral"]


def tiny_bloom() -> nn.Module:
    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, bos_token_id=0,
            eos_token_id=0, pad_token_id=3,
        )
    )  # fmt: skip


def tiny_opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, ffn_dim=32,
            num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
            bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )
    )  # fmt: skip


def tiny_mixtral(experts_per_token: int = 2) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=experts_per_token, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def tiny_mamba() -> nn.Module:
    return MambaForCausalLM(
        MambaConfig(
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2,
            bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def tiny_bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=64,
        )
    )  # fmt: skip


def tiny_t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


MAKERS = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "bloom": tiny_bloom,
    "opt": tiny_opt,
    "mixtral": tiny_mixtral,
    "mamba": tiny_mamba,
    "bert": tiny_bert,
    "t5": tiny_t5,
}
GENERATING = ["eiffel", "gpt2", "llama", "bloom", "opt", "mixtral", "mamba"]


def make(name: str) -> LanguageModel:
    """One of the models, or the bundled one; its weights are there."""
    if name == "eiffel":
        model = LanguageModel("insitu/eiffel", device_map="cpu")
        model.load()
        return model
    torch.manual_seed(0)
    module = MAKERS[name]().eval()
    spread_out(module)
    return LanguageModel(module)
