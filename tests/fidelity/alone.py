"""What plain PyTorch hooks see of a prompt alone, and how such experiments are written.

The oracle is one forward of one prompt, with ordinary hooks in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from insitu import LanguageModel
from tests.fidelity.architectures import MAKERS, spread_out

Place = tuple[str, str]
Change = Callable[[torch.Tensor], torch.Tensor]
SHARING = pytest.mark.parametrize("share", [True, False, None])
LENGTH = 12


def tiny_mistral() -> nn.Module:
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=100, sliding_window=8,
        )
    )  # fmt: skip


def tiny_qwen3() -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=4, vocab_size=100,
        )
    )  # fmt: skip


def tiny_gemma2() -> nn.Module:
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=100, sliding_window=4,
            query_pre_attn_scalar=8, attn_implementation="eager",
        )
    )  # fmt: skip


def tiny_both_ways() -> nn.Module:
    """BERT is no decoder unless it is told to be one, and attends in both directions."""
    return BertLMHeadModel(
        BertConfig(
            vocab_size=100, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=32,
        )
    )  # fmt: skip


ALL = {
    **MAKERS,
    "both ways": tiny_both_ways,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "qwen3": tiny_qwen3,
}
GENERATORS = [name for name in ALL if name not in ("bert", "t5", "both ways")]
# At the blocks of these, forwards can begin. At OPT's it depends on the version of Transformers.
SHARES = {"gpt2", "llama", "mistral", "gemma2", "qwen3"}


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    module = ALL[name]().eval()
    spread_out(module)  # so that a mistake shows
    return LanguageModel(module)


kept = cache(make)  # what is found out about a model once takes longer than a test


def prompts(count: int, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(count)
    found = [torch.randint(4, 100, shape, generator=draw) for shape in shapes or [(1, LENGTH)]]
    while len(found) < count:
        found.append(torch.randint(4, 100, found[-1].shape, generator=draw))
    return found


VECTORS = torch.randn(40, 16, generator=torch.Generator().manual_seed(5))


# --- the oracle


def first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def alone(
    model: LanguageModel,
    ids: torch.Tensor,
    read: Collection[Place],
    change: Mapping[Place, Change] | None = None,
) -> dict[Place, torch.Tensor]:
    """What hooks see at some places in a forward of one prompt, in which values are changed."""
    module, change = model.module, change or {}
    seen: dict[Place, torch.Tensor] = {}
    handles = []

    def passing(place: Place, value: torch.Tensor) -> torch.Tensor:
        if place in change:
            value = change[place](value.clone())
        if place in read:
            seen[place] = value.clone()
        return value

    def before(path: str) -> Any:
        def hook(part: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (passing((path, "input"), args[0]), *args[1:]), kwargs
            name = next(name for name in inspect.signature(part.forward).parameters)
            return args, {**kwargs, name: passing((path, "input"), kwargs[name])}

        return hook

    def after(path: str) -> Any:
        def hook(part: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, Mapping):  # the whole model
                passing((path, "output"), output["logits"])
                return None
            new = passing((path, "output"), first(output))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    for path, kind in {*read, *change}:
        part = module.get_submodule(path)
        if kind == "input":
            handles.append(part.register_forward_pre_hook(before(path), with_kwargs=True))
        else:
            handles.append(part.register_forward_hook(after(path)))
    try:
        with torch.no_grad():
            options = {"use_cache": False} if model.traits.takes_use_cache else {}
            module(input_ids=ids, **options)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def assert_close(
    found: Any, expected: torch.Tensor, what: object = "", limit: float = 1e-5
) -> None:
    value = found.value
    assert value.shape == expected.shape, what
    scale = max(float(expected.abs().max()), 0.1)  # a few numbers may be small by chance
    worst = float((value - expected).abs().max())
    assert worst <= limit * scale, (what, worst, scale)


# --- how experiments are written with Insitu


def at(model: LanguageModel, path: str) -> Any:
    handle: Any = model
    for name in path.split(".") if path else ():
        handle = handle[name]
    return handle


def blocks_of(model: LanguageModel) -> list[str]:
    return list(model.traits.block_views[False])


def logits_of(model: LanguageModel) -> Any:
    return model.output.logits if model.traits.unembedding_paths else model.output


END: Place = ("", "output")


def patched(position: int, vector: torch.Tensor) -> Change:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, position] = vector
        return hidden

    return change


def sweep(
    model: LanguageModel,
    clean: torch.Tensor,
    positions: Sequence[int] = (9, 10, 11),
    **options: Any,
) -> tuple[dict[int, Any], Any]:
    """Patches some positions behind the second block; the logits that follow, and the block."""
    path = blocks_of(model)[1]
    vectors = VECTORS.to(next(model.module.parameters()).dtype)
    saved = {}
    with model.trace(**options) as tracer:
        for position in positions:
            with tracer.invoke(clean):
                at(model, path).output[0][:, position] = vectors[position]
                saved[position] = model.lm_head.output[0, -1].save()
    return saved, tracer


def swept(model: LanguageModel, clean: torch.Tensor, position: int) -> torch.Tensor:
    """The oracle for one line of a sweep."""
    vector = VECTORS[position].to(next(model.module.parameters()).dtype)
    change = {(blocks_of(model)[1], "output"): patched(position, vector)}
    return alone(model, clean, [END], change)[END][0, -1]
