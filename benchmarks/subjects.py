"""The models and the prompts that experiments are measured on, the same in every environment.

Weights and tokens come from seeds, so that what a peer computes in an environment of its own can
be compared with what Insitu computes. It imports nothing of Insitu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

LAYERS = 12
HEADS = 12
LENGTH = 16  # of prompts, in tokens
STEERED = 6  # the block that is steered, and collected from
STRENGTHS = [float(strength) for strength in range(-5, 5)]


def gpt2(width: int = 768, heads: int = HEADS, vocabulary: int = 50257) -> GPT2LMHeadModel:
    """Returns a GPT-2 with random weights, of the size of GPT-2 small if nothing else is said."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=width,
        n_layer=LAYERS,
        n_head=heads,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config).eval()


def llama() -> LlamaForCausalLM:
    """Returns a model like Llama with random weights, about as large as GPT-2 small."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=32000,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


class Parts(NamedTuple):
    """Where the parts of a model are. They are modules of a model, or handles of a wrapped one."""

    embedding: Any
    blocks: list[Any]
    projections: list[Any]  # of each block, what is given all heads of its attention
    norm: Any
    head: Any


def parts(root: Any, family: str) -> Parts:
    """Returns the parts of a model, or their handles, for `family` "gpt2" or "llama"."""
    if family == "llama":
        inner = root.model
        blocks = list(inner.layers)
        projections = [block.self_attn.o_proj for block in blocks]
        return Parts(inner.embed_tokens, blocks, projections, inner.norm, root.lm_head)
    inner = root.transformer
    blocks = list(inner.h)
    projections = [block.attn.c_proj for block in blocks]
    return Parts(inner.wte, blocks, projections, inner.ln_f, root.lm_head)


def tokens(module: nn.Module, length: int, seed: int) -> torch.Tensor:
    """Returns a prompt of random tokens, `(1, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, module.config.vocab_size, (1, length), generator=generator)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    """Returns random numbers: a steering vector, or noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fingerprint(values: list[torch.Tensor]) -> float:
    """Returns a number by which the results of two environments are compared, also their order."""
    stacked = torch.stack(list(values)).flatten(1).double()
    weights = torch.linspace(1, 2, len(stacked), dtype=torch.float64)
    return float((stacked.abs().mean(1) * weights).mean())
