# ruff: noqa: B023
"""Small GPT-2 and Llama, computed by hand with a residual stream of its own for each receiver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

CLEAN = torch.tensor([5, 17, 42, 8, 60])
CORRUPTED = torch.tensor([5, 31, 42, 77, 60])
Edges = set[tuple[str, str]]


@dataclass
class Found:
    """What a computation went through.

    Attributes:
        added: what each sender adds, `(position, d_model)`, in order.
        logits: the logits.
        upstream: the senders that each receiver reads, by its name.
    """

    added: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    upstream: dict[str, list[str]] = field(default_factory=dict)


@torch.no_grad()
def circuit(module: nn.Module, edges: Callable[[str, str], bool]) -> Tensor:
    """The logits where edges that are not in a circuit carry what they do in the corrupted run."""
    other = compute(module, CORRUPTED)
    return compute(module, CLEAN, lambda s, r, now: now if edges(s, r) else other.added[s]).logits


def compute(
    module: Any,
    ids: Tensor,
    carried: Callable[[str, str, Tensor], Tensor] = lambda sender, receiver, now: now,
    shifts: Mapping[str, Tensor] | None = None,
    start: Tensor | None = None,
) -> Found:
    """Computes a forward.

    Args:
        module: the model.
        ids: the prompt.
        carried: what an edge carries, from its sender, its receiver and what the sender adds.
        shifts: what is added to the stream as a receiver reads it, by the receiver's name.
        start: embeddings, if not those of the prompt.
    """
    found, biases = Found(), torch.zeros(())
    config = module.config
    is_gpt2 = isinstance(module, GPT2LMHeadModel)
    base = module.transformer if is_gpt2 else module.model

    def read(receiver: str) -> Tensor:
        found.upstream[receiver] = list(found.added)
        stream = sum((carried(s, receiver, v) for s, v in found.added.items()), biases)
        return stream + (shifts or {}).get(receiver, torch.zeros(()))

    if start is None:
        start = (
            base.wte(ids) + base.wpe(torch.arange(len(ids))) if is_gpt2 else base.embed_tokens(ids)
        )
    found.added["input"] = start
    heads = config.num_attention_heads
    keys = heads if is_gpt2 else config.num_key_value_heads
    size = config.hidden_size // heads
    mask = torch.full((len(ids), len(ids)), -math.inf).triu(1)
    for layer, block in enumerate(base.h if is_gpt2 else base.layers):
        norm = block.ln_1 if is_gpt2 else block.input_layernorm

        def made(kind: str, head: int) -> Tensor:
            stream = norm(read(f"a{layer}.{kind}{head}"))
            own = slice(head * size, (head + 1) * size)
            if is_gpt2:
                at = "qkv".index(kind) * config.hidden_size
                own = slice(at + own.start, at + own.stop)
                return stream @ block.attn.c_attn.weight[:, own] + block.attn.c_attn.bias[own]
            made = stream @ getattr(block.self_attn, f"{kind}_proj").weight[own].T
            if kind != "v":
                cos, sin = base.rotary_emb(made, torch.arange(len(ids))[None])
                made = apply_rotary_pos_emb(made[None, None], made[None, None], cos, sin)[0][0, 0]
            return made

        q = [made("q", head) for head in range(heads)]
        k, v = ([made(kind, head) for head in range(keys)] for kind in "kv")
        added: dict[str, Tensor] = {}
        for head in range(heads):
            group = head * keys // heads
            z = (q[head] @ k[group].T / math.sqrt(size) + mask).softmax(-1) @ v[group]
            own = slice(head * size, (head + 1) * size)
            weight = (
                block.attn.c_proj.weight[own]
                if is_gpt2
                else block.self_attn.o_proj.weight[:, own].T
            )
            added[f"a{layer}.h{head}"] = z @ weight
        found.added |= added
        if is_gpt2:
            biases = biases + block.attn.c_proj.bias
            found.added[f"m{layer}"] = block.mlp(block.ln_2(read(f"m{layer}")))
        else:
            found.added[f"m{layer}"] = block.mlp(block.post_attention_layernorm(read(f"m{layer}")))
    final = base.ln_f if is_gpt2 else base.norm
    found.logits = module.lm_head(final(read("logits")))
    return found


def slopes(
    module: nn.Module, metric: Callable[[Tensor], Tensor], start: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of a metric with respect to what each receiver reads, in the clean run."""
    with torch.no_grad():
        plain = compute(module, CLEAN)
    leaves = {r: torch.zeros_like(plain.added["input"], requires_grad=True) for r in plain.upstream}
    made = compute(module, CLEAN, shifts=leaves, start=start)
    gradients = torch.autograd.grad(metric(made.logits), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def linear_gpt2(layers: int = 2, width: int = 8, heads: int = 2) -> GPT2LMHeadModel:
    """A GPT-2 that is linear in its stream: no norms, attention without preferences."""
    torch.manual_seed(1)
    config = GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        vocab_size=100,
        n_positions=40,
        activation_function="linear",
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    module = GPT2LMHeadModel(config).eval()
    module.transformer.ln_f = nn.Identity()
    for block in module.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, :width] = 0
            block.attn.c_attn.bias.normal_()
            block.attn.c_attn.bias[:width] = 0
    return module.eval()
