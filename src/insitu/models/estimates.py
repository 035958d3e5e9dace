"""What a forward of a model costs in time and memory, estimated from its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from insitu.batching.cost_model import Costs
from insitu.models.configuration import all_said, said, text_config

# A forward reads every weight, however few tokens it has. As many tokens take as long to compute:
# measured on two cores in float32, and about what an accelerator's bandwidth comes to.
_READING = {"cpu": 40}
_READING_ELSEWHERE = 150
# What takes as long as one call of a module, 10 µs; as moving one of the values that a token has
# inside a block in and out of memory, as often as blocks do; and as one attention score. Measured
# on two cores, where 1e9 operations take 5 to 6 ms, on models 16 and 768 wide.
_CALL = 2e6
_MOVED = 260.0
_SCORED = 180.0


def estimated_costs(
    module: Any, modules: Mapping[str, nn.Module], blocks: Sequence[str], device: torch.device
) -> Costs:
    """Returns what forwards of a model cost.

    Args:
        module: the model; a language model of Transformers.
        modules: its tree, by path.
        blocks: the paths of its blocks, if they are known.
        device: where it runs.
    """
    head = module.get_output_embeddings()
    unembedding = 2.0 * weight_of(head).numel() if head is not None else 0.0
    ends = (module.get_input_embeddings(), head)
    embeddings = {id(weight_of(part)) for part in ends if part}
    text = text_config(module.config)
    width = said(text, "hidden_size", default=0)
    heads = _largest(all_said(text, "num_attention_heads"))
    attending = heads * _largest(all_said(text, "head_dim")) or width
    parts = [modules[blocks[0]]] if blocks else [module]
    found = [
        (name, weight.numel())
        for part in parts
        for name, weight in part.named_parameters()
        if weight.ndim > 1 and id(weight) not in embeddings
    ]
    weights = sum(size for _, size in found)
    chosen = _chosen_experts(text)
    used = sum(size * (chosen if "experts" in name.split(".") else 1) for name, size in found)
    calls = sum(1 for part in parts for _ in part.modules()) * _CALL
    reading = _READING.get(device.type, _READING_ELSEWHERE)
    return Costs(
        blocks=len(blocks) or 1,
        token=2.0 * used,
        pair=4.0 * attending,
        moved=_MOVED * used / max(width, 1),
        scored=_SCORED * heads,
        block=2.0 * weights * reading + calls,
        call=8 * _CALL,
        unembedding=unembedding,
    )


def weight_of(part: Any) -> torch.Tensor:
    """Returns the weight of a module: a method gives it where torch has quantised it."""
    weight = part.weight
    return weight if isinstance(weight, torch.Tensor) else weight()


def _chosen_experts(text: Any) -> float:
    """Which share of its experts a model lets a token pass, by its config."""
    chosen = said(text, "num_experts_per_tok")
    counts = all_said(text, "num_local_experts", "num_experts", "n_routed_experts")
    count = next((count for count in counts if count), None)
    return chosen / count if chosen and count else 1.0


def bytes_per_token(module: Any) -> int:
    """Returns how much memory a forward needs for a token, about: its logits and hidden states."""
    text = text_config(module.config)
    width = said(text, "hidden_size", default=0) or 1024
    inner = _largest(all_said(text, "intermediate_size")) or 4 * width
    size = next(module.parameters()).element_size()
    return size * (8 * width + 3 * inner + 2 * (said(text, "vocab_size") or 0))


def _largest(sizes: list[Any]) -> int:
    """The largest of some sizes, 0 if there are none: some configs list one for each layer."""
    flat = [one for size in sizes for one in (size if isinstance(size, list | tuple) else (size,))]
    return max((one for one in flat if isinstance(one, int)), default=0)
