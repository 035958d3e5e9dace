"""Whatever is batched, shared, left out or split: each prompt gives what plain hooks see of it alone.

The oracle is one forward of one prompt, with ordinary PyTorch hooks in it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

import insitu
from insitu import LanguageModel
from tests.fidelity.architectures import MAKERS, spread_out

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many

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


def tiny_gemma2() -> nn.Module:
    return Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, vocab_size=100, sliding_window=4,
            query_pre_attn_scalar=8, attn_implementation="eager",
        )
    )  # fmt: skip


ALL = {**MAKERS, "mistral": tiny_mistral, "gemma2": tiny_gemma2}
GENERATORS = [name for name in ALL if name not in ("bert", "t5")]
# At these, forwards can begin at a block. Mixtral's are not tried in this test: see `SHARES`.
SHARES = {"gpt2", "llama", "opt", "mistral", "gemma2"}


def make(name: str, **config: Any) -> LanguageModel:
    torch.manual_seed(0)
    module = ALL[name]().eval()
    spread_out(module)  # so that a mistake shows
    for key, value in config.items():
        setattr(module.config, key, value)
    return LanguageModel(module)


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param)


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
            options = {"use_cache": False} if model.takes_use_cache else {}
            module(input_ids=ids, **options)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def assert_close(found: Any, expected: torch.Tensor, what: object = "", limit: float = 1e-5) -> None:
    value = found.value
    assert value.shape == expected.shape, what
    scale = float(expected.abs().max())
    worst = float((value - expected).abs().max())
    assert worst <= limit * scale, (what, worst, scale)


# --- how experiments are written with Insitu


def at(model: LanguageModel, path: str) -> Any:
    handle: Any = model
    for name in path.split(".") if path else ():
        handle = handle[name]
    return handle


def blocks_of(model: LanguageModel) -> list[str]:
    return list(model.block_views[False])


def logits_of(model: LanguageModel) -> Any:
    return model.output.logits if model.unembedding else model.output


END: Place = ("", "output")


# --- sweeps


def patched(position: int, vector: torch.Tensor) -> Change:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, position] = vector
        return hidden

    return change


@SHARING
@pytest.mark.parametrize("name", GENERATORS)
def test_patching_every_layer_and_position(name: str, share: bool | None) -> None:
    model = make(name)
    clean, source = prompts(2)
    blocks, positions = blocks_of(model), range(0, LENGTH, 4)
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        with tracer.invoke(source):
            donors = {path: at(model, path).output[0] for path in blocks}
        for path in blocks:
            for position in positions:
                with tracer.invoke(clean):
                    at(model, path).output[0][:, position] = donors[path][:, position]
                    saved[path, position] = logits_of(model)[:, -1].save()
    donated = alone(model, source, [(path, "output") for path in blocks])
    for (path, position), logits in saved.items():
        vector = donated[path, "output"][:, position]
        change = {(path, "output"): patched(position, vector)}
        assert_close(logits, alone(model, clean, [END], change)[END][:, -1], (path, position))
    skipped = max(single.skipped for single in tracer.plan.passes)
    if share:
        assert (skipped > 0) == (name in SHARES), tracer.plan.explain()
    if share is False:
        assert not skipped


@SHARING
@pytest.mark.parametrize("name", sorted(SHARES))
def test_only_late_positions_are_computed_where_early_ones_are_alike(
    name: str, share: bool | None
) -> None:
    model = make(name)
    (clean,) = prompts(1)
    path, last = blocks_of(model)[0], blocks_of(model)[-1]
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (8, 9, 11, -1):
            with tracer.invoke(clean):
                at(model, path).output[0][:, position] = VECTORS[position]
                written = at(model, path).output[0].save()  # all of it is known
                hidden = at(model, last).output[0][:, position:].save()
                saved[position] = written, hidden, logits_of(model)[0, -1].save()
    for position, (written, hidden, logits) in saved.items():
        change = {(path, "output"): patched(position, VECTORS[position])}
        seen = alone(model, clean, [(path, "output"), (last, "output"), END], change)
        assert_close(written, seen[path, "output"], position)
        assert_close(hidden, seen[last, "output"][:, position:], position)
        assert_close(logits, seen[END][0, -1], position)
    if share:
        assert tracer.plan.passes[-1].positions == 4, tracer.plan.explain()
