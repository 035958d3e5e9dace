"""Whatever is batched, shared, left out or split: each prompt is as plain hooks see it alone.

The oracle is one forward of one prompt, with ordinary PyTorch hooks in it.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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


ALL = {**MAKERS, "mistral": tiny_mistral, "gemma2": tiny_gemma2, "qwen3": tiny_qwen3}
GENERATORS = [name for name in ALL if name not in ("bert", "t5")]
# At these, forwards can begin at a block. Mixtral's are not tried in this test: see `SHARES`.
SHARES = {"gpt2", "llama", "opt", "mistral", "gemma2", "qwen3"}


def make(name: str) -> LanguageModel:
    torch.manual_seed(0)
    module = ALL[name]().eval()
    spread_out(module)  # so that a mistake shows
    return LanguageModel(module)


kept = cache(make)  # what is found out about a model once takes longer than a test


@pytest.fixture(params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return kept(request.param)


@pytest.fixture(params=["gpt2", "llama"])
def own_model(request: pytest.FixtureRequest) -> LanguageModel:
    """One that a test may change."""
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
    model = kept(name)
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
    model = kept(name)
    (clean,) = prompts(1)
    path, last, head = blocks_of(model)[0], blocks_of(model)[-1], model.unembedding[0]
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (8, 9, 11, -1):
            with tracer.invoke(clean):
                at(model, path).output[0][:, position] = VECTORS[position]
                written = at(model, path).output[0].save()  # all of it is known
                hidden = at(model, last).output[0][:, position:].save()
                saved[position] = written, hidden, at(model, head).output[0, -1].save()
    for position, (written, hidden, logits) in saved.items():
        change = {(path, "output"): patched(position, VECTORS[position])}
        seen = alone(model, clean, [(path, "output"), (last, "output"), (head, "output")], change)
        assert_close(written, seen[path, "output"], position)
        assert_close(hidden, seen[last, "output"][:, position:], position)
        assert_close(logits, seen[head, "output"][0, -1], position)
    if share:
        assert tracer.plan.passes[-1].positions == 4, tracer.plan.explain()


@pytest.mark.parametrize("name", sorted(SHARES))
def test_what_the_model_returns_is_without_the_keys_and_values_of_others(name: str) -> None:
    model = kept(name)
    (clean,) = prompts(1)
    path, inner = blocks_of(model)[0], blocks_of(model)[0].rpartition(".")[0].rpartition(".")[0]
    with model.trace(share_prefixes=True) as tracer:
        with tracer.invoke(clean):
            whole, hidden = model.output.save(), at(model, inner).output.save()
        with tracer.invoke(clean):
            at(model, path).output[0][:, 9] = VECTORS[9]
            logits = model.output.logits[0, -1].save()
    with torch.no_grad():
        expected = model.module(clean, use_cache=False)
        assert whole.value.keys() == expected.keys()
        torch.testing.assert_close(whole.value.logits, expected.logits, rtol=1e-5, atol=1e-5)
        expected = model.module.get_submodule(inner)(clean, use_cache=False)
        assert hidden.value.keys() == expected.keys()
    change = {(path, "output"): patched(9, VECTORS[9])}
    assert_close(logits, alone(model, clean, [END], change)[END][0, -1])
    assert tracer.plan.passes[-1].positions == 3


# --- forms of writes: as one would write them with Insitu, and what that is in plain torch


def in_place(block: Any, position: int) -> None:
    block.output[0][:, position] = VECTORS[position]


def from_there_on(block: Any, position: int) -> None:
    block.output[0][:, position:] += VECTORS[0]


def a_view_of_it(block: Any, position: int) -> None:
    block.output[0][:, position:][..., :5].mul_(3)


def in_a_copy(block: Any, position: int) -> None:
    hidden = block.output[0].clone()
    hidden[:, position] = VECTORS[position]
    block.output = hidden


def in_a_copy_of_a_copy(block: Any, position: int) -> None:
    hidden = block.output[0].clone().clone()
    hidden[0, position:] = VECTORS[position]
    block.output[0] = hidden


def functional(block: Any, position: int) -> None:
    block.output = block.output[0] * 2


def whole_part(block: Any, position: int) -> None:
    block.output[0] = block.output[0] + VECTORS[position]


def whole_tuple(block: Any, position: int) -> None:
    block.output = (block.output[0] - 1,)


def with_a_mask(block: Any, position: int) -> None:
    hidden = block.output[0]
    hidden[hidden > 0.5] = 0.5


def of_an_early_position(block: Any, position: int) -> None:
    block.output[0][:, position] = block.output[0][:, 0] * 3


def and_an_early_one(block: Any, position: int) -> None:
    block.output[0][:, position] = 0
    block.output[0][:, 1] = 0


def a_list_of_positions(block: Any, position: int) -> None:
    block.output[0][:, [2, position]] = 1.5


def twice(block: Any, position: int) -> None:
    block.output[0][:, position] += 1
    block.output = block.output[0] * 0.5


def to_itself(block: Any, position: int) -> None:
    block.output = block.output[0]


FORMS = [
    in_place,
    from_there_on,
    a_view_of_it,
    in_a_copy,
    in_a_copy_of_a_copy,
    functional,
    whole_part,
    whole_tuple,
    with_a_mask,
    of_an_early_position,
    and_an_early_one,
    a_list_of_positions,
    twice,
    to_itself,
]


class Block:
    """Stands for a block's handle where the same lines are to run on plain tensors."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._output = [hidden]

    @property
    def output(self) -> list[torch.Tensor]:
        return self._output

    @output.setter
    def output(self, value: Any) -> None:
        self._output = [first(value)]


def in_torch(form: Callable[[Any, int], None], position: int) -> Change:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        block = Block(hidden)
        form(block, position)
        return block.output[0]

    return change


@SHARING
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_writes_of_every_form(
    model: LanguageModel, form: Callable[[Any, int], None], share: bool | None
) -> None:
    (clean,) = prompts(1)
    path, after = blocks_of(model)[1:3]
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (7, 10):
            with tracer.invoke(clean):
                form(at(model, path), position)
                standing = at(model, path).output[0].save()
                hidden = at(model, after).output[0][:, position:].save()
                saved[position] = standing, hidden, model.lm_head.output[0, -1].save()
        with tracer.invoke(clean):
            untouched = model.lm_head.output.save()
    for position, (standing, hidden, logits) in saved.items():
        change = {(path, "output"): in_torch(form, position)}
        seen = alone(model, clean, [(path, "output"), (after, "output"), END], change)
        assert_close(standing, seen[path, "output"])
        assert_close(hidden, seen[after, "output"][:, position:])
        assert_close(logits, seen[END][0, -1])
    assert_close(untouched, alone(model, clean, [END])[END])
    if share and form is not twice:  # what is written both ways is not batched
        assert any(single.skipped for single in tracer.plan.passes)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_one_prompt_is_as_with_hooks_bit_for_bit(
    model: LanguageModel, form: Callable[[Any, int], None]
) -> None:
    (clean,) = prompts(1)
    path = blocks_of(model)[1]
    with model.trace(clean):
        form(at(model, path), 7)
        logits = model.lm_head.output.save()
    expected = alone(model, clean, [END], {(path, "output"): in_torch(form, 7)})[END]
    assert torch.equal(logits.value, expected)


HEAD_INPUT = {"gpt2": "transformer.h.{}.attn.c_proj", "llama": "model.layers.{}.self_attn.o_proj"}


@SHARING
@pytest.mark.parametrize("name", HEAD_INPUT)
def test_patching_every_head(name: str, share: bool | None) -> None:
    model = kept(name)
    clean, source = prompts(2)
    paths = [HEAD_INPUT[name].format(layer) for layer in range(len(blocks_of(model)))]
    heads = [slice(start, start + 4) for start in range(0, 16, 4)]
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        with tracer.invoke(source):
            donors = {path: at(model, path).input for path in paths}
        for path in paths:
            for number, head in enumerate(heads):
                with tracer.invoke(clean):
                    at(model, path).input[..., head] = donors[path][..., head]
                    saved[path, number] = model.lm_head.output[0, -1].save()
    donated = alone(model, source, [(path, "input") for path in paths])
    for (path, number), logits in saved.items():

        def change(
            given: torch.Tensor, path: str = path, head: slice = heads[number]
        ) -> torch.Tensor:
            given[..., head] = donated[path, "input"][..., head]
            return given

        expected = alone(model, clean, [END], {(path, "input"): change})[END]
        assert_close(logits, expected[0, -1], (path, number))
    if share:
        assert any(single.skipped for single in tracer.plan.passes)


@SHARING
def test_prompts_of_several_rows_and_of_different_lengths(
    model: LanguageModel, share: bool | None
) -> None:
    several = prompts(4, (3, 9), (1, 9), (2, 12), (1, 12))
    blocks = blocks_of(model)
    saved = []
    with model.trace(share_prefixes=share) as tracer:
        for ids in several:
            for path in blocks[:3]:
                for position in (0, 5, -1):
                    with tracer.invoke(ids):
                        at(model, path).output[0][-1, position] = VECTORS[position]
                        logits = model.lm_head.output[:, -1].save()
                        saved.append((ids, path, position, logits))
    for ids, path, position, logits in saved:

        def change(hidden: torch.Tensor, position: int = position) -> torch.Tensor:
            hidden[-1, position] = VECTORS[position]
            return hidden

        expected = alone(model, ids, [END], {(path, "output"): change})[END]
        assert_close(logits, expected[:, -1], (ids.shape, path, position))


# --- values of other prompts


@SHARING
def test_a_late_layer_of_one_prompt_in_an_early_one_of_another(share: bool | None) -> None:
    model = kept("gpt2")
    one, other = prompts(2)
    late, early = "transformer.h.3", "transformer.h.1"
    with model.trace(share_prefixes=share) as tracer:
        using, used = tracer.invoke(one), tracer.invoke(other)
        with used:
            donor = model.transformer.h[3].output[0]
        with using:
            model.transformer.h[1].output = donor
            patched_logits = model.lm_head.output.save()
        with tracer.invoke(one):
            plain = model.lm_head.output.save()
    vector = alone(model, other, [(late, "output")])[late, "output"]
    assert_close(
        patched_logits, alone(model, one, [END], {(early, "output"): lambda _: vector})[END]
    )
    assert_close(plain, alone(model, one, [END])[END])
    assert len(tracer.plan.passes) == 2


@SHARING
@pytest.mark.parametrize("equal", [True, False], ids=["one prompt", "two prompts"])
def test_prompts_that_need_each_other(
    model: LanguageModel, equal: bool, share: bool | None
) -> None:
    one, other = prompts(2)
    other = one.clone() if equal else other
    first_block, second, third = blocks_of(model)[:3]
    with model.trace(share_prefixes=share) as tracer:
        a, b, c = tracer.invoke(one), tracer.invoke(other), tracer.invoke(one)
        with a:
            at(model, first_block).output[0][:, 0] = VECTORS[0]
            of_a = at(model, second).output[0]
        with b:
            of_b = at(model, first_block).output[0]
        with a:
            at(model, second).output[0][:, 3] = of_b[:, 3]
            logits_a = model.lm_head.output.save()
        with b:
            at(model, third).output[0][:, 5] = of_a[:, 5]
            logits_b = model.lm_head.output.save()
        with c:
            logits_c = model.lm_head.output.save()
    vector_b = alone(model, other, [(first_block, "output")])[first_block, "output"][:, 3]
    change = {
        (first_block, "output"): patched(0, VECTORS[0]),
        (second, "output"): patched(3, vector_b),
    }
    seen = alone(model, one, [(second, "output"), END], change)
    assert_close(logits_a, seen[END])
    change = {(first_block, "output"): patched(0, VECTORS[0])}
    arrived = alone(model, one, [(second, "output")], change)[second, "output"]
    change = {(third, "output"): patched(5, arrived[:, 5])}
    assert_close(logits_b, alone(model, other, [END], change)[END])
    assert_close(logits_c, alone(model, one, [END])[END])


@SHARING
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 12, 7)], ids=str)
def test_a_chain_of_three_prompts(
    model: LanguageModel, lengths: tuple[int, ...], share: bool | None
) -> None:
    """Each goes on, at its first block, from the last position of the last block of the other."""
    chain = prompts(3, *((1, length) for length in lengths))
    early, late = blocks_of(model)[0], blocks_of(model)[-1]
    saved = [None] * 3
    with model.trace(share_prefixes=share) as tracer:
        invocations = [tracer.invoke(ids) for ids in chain]
        values = []
        for invocation in invocations:
            with invocation:
                values.append(at(model, late).output[0][:, -1])
        for number in (2, 0, 1):  # in any order
            with invocations[number]:
                if number:
                    at(model, early).output[0][:, 2] = values[number - 1]
                saved[number] = model.lm_head.output[0, -1].save()
    change: dict[Place, Change] = {}
    for ids, logits in zip(chain, saved, strict=True):
        seen = alone(model, ids, [(late, "output"), END], change)
        assert_close(logits, seen[END][0, -1])
        change = {(early, "output"): patched(2, seen[late, "output"][:, -1])}
    assert len(tracer.plan.passes) == 3


# --- reads in blocks that are not run again


@SHARING
def test_what_is_read_in_blocks_that_are_left_out(model: LanguageModel, share: bool | None) -> None:
    (clean,) = prompts(1)
    path = blocks_of(model)[2]
    read = [
        (place, kind)
        for place, part in model.module.named_modules()
        for kind in ("input", "output")
        if place and type(part) in (nn.Linear, nn.LayerNorm, type(at(model, path).module))
    ]
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (9, 10, 11):
            with tracer.invoke(clean):
                at(model, path).output[0][:, position] = VECTORS[position]
                for place in read:
                    value = getattr(at(model, place[0]), place[1])
                    if place[0] in blocks_of(model) and place[1] == "output":
                        value = value[0]
                    saved[position, place] = value.save()
    for position in (9, 10, 11):
        change = {(path, "output"): patched(position, VECTORS[position])}
        seen = alone(model, clean, read, change)
        for place in read:
            assert_close(saved[position, place], seen[place], place)
    if share:
        assert any(single.skipped for single in tracer.plan.passes)


@SHARING
def test_attention_patterns(share: bool | None) -> None:
    model = make("gpt2")
    model.module.set_attn_implementation("eager")
    (clean,) = prompts(1)
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (9, 11):
            with tracer.invoke(clean):
                model.transformer.h[1].output[0][:, position] = VECTORS[position]
                before = model.transformer.h[0].attn.ops.softmax[0].output.save()
                after = model.transformer.h[2].attn.output[1].save()
                saved[position] = before, after
    expected: list[torch.Tensor] = []
    for position in (9, 11):
        for layer in (0, 2):
            handle = model.transformer.h[layer].attn.module.register_forward_hook(
                lambda part, args, output: expected.append(output[1])
            )
            alone(
                model,
                clean,
                [],
                {("transformer.h.1", "output"): patched(position, VECTORS[position])},
            )
            handle.remove()
    for found, right in zip([x for pair in saved.values() for x in pair], expected, strict=True):
        assert_close(found, right)


# --- budgets


@SHARING
@pytest.mark.parametrize("budget", [1, 11, 12, 25, 40, 1000])
def test_passes_of_several_prompts_stay_within_the_budget(
    model: LanguageModel, budget: int, share: bool | None
) -> None:
    lengths = (12, 12, 3, 12, 7, 12, 1, 7)
    several = [prompts(8, (1, length))[0] for length in lengths]  # equal where as long
    blocks = blocks_of(model)
    saved = []
    with model.trace(max_tokens_per_pass=budget, share_prefixes=share) as tracer:
        invocations = [tracer.invoke(ids) for ids in several]
        with invocations[0]:
            donor = at(model, blocks[1]).output[0][:, -1]
        for number, invocation in enumerate(invocations):
            with invocation:
                if number % 3:
                    at(model, blocks[number % 2]).output[0][:, -1] = VECTORS[number]
                elif number:
                    at(model, blocks[2]).output[0][:, -1] = donor
                saved.append(model.lm_head.output[0, -1].save())
    (vector,) = alone(model, several[0], [(blocks[1], "output")]).values()
    for number, (ids, logits) in enumerate(zip(several, saved, strict=True)):
        change: dict[Place, Change] = {}
        if number % 3:
            change = {(blocks[number % 2], "output"): patched(-1, VECTORS[number])}
        elif number:
            change = {(blocks[2], "output"): patched(-1, vector[:, -1])}
        assert_close(logits, alone(model, ids, [END], change)[END][0, -1], number)
    for single in tracer.plan.passes:
        assert single.rows == 1 or single.rows * single.positions <= budget


def test_no_more_passes_than_the_budget_asks_for(model: LanguageModel) -> None:
    counts = []
    for budget in (12, 24, 36, 72):
        with model.trace(max_tokens_per_pass=budget) as tracer:
            for ids in prompts(6):
                with tracer.invoke(ids):
                    model.lm_head.output[0, -1].save()
        counts.append(len(tracer.plan.passes))
    assert counts == [6, 3, 2, 1]


@pytest.mark.parametrize("share", [True, False])
def test_a_budget_does_not_part_what_uses_each_other_in_a_ring(share: bool) -> None:
    """Two of them use values of two others that were written before and after them."""
    model = kept("gpt2")
    four = prompts(4)
    with model.trace(max_tokens_per_pass=24, share_prefixes=share) as tracer:
        invocations = [tracer.invoke(ids) for ids in four]
        hidden = []
        for invocation in invocations:
            with invocation:
                hidden.append(model.transformer.h[1].output[0])
        saved = {}
        for target, source in ((0, 2), (3, 1)):
            with invocations[target]:
                model.transformer.h[2].output = hidden[source]
                saved[target, source] = model.lm_head.output.save()
    for (target, source), logits in saved.items():
        (vector,) = alone(model, four[source], [("transformer.h.1", "output")]).values()
        change: dict[Place, Change] = {("transformer.h.2", "output"): lambda _, v=vector: v}
        assert_close(logits, alone(model, four[target], [END], change)[END])


# --- models in other states


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


@SHARING
def test_a_model_in_half_precision(own_model: LanguageModel, share: bool | None) -> None:
    model = own_model
    model.module.bfloat16()
    (clean,) = prompts(1)
    saved, tracer = sweep(model, clean, share_prefixes=share)
    for position, logits in saved.items():
        assert logits.value.dtype == torch.bfloat16
        assert_close(logits, swept(model, clean, position), limit=3e-2)
    if share:
        assert tracer.plan.passes[-1].skipped


@SHARING
def test_a_model_with_edits(model: LanguageModel, share: bool | None) -> None:
    (clean,) = prompts(1)
    path = blocks_of(model)[0]
    with model.edit() as edited:
        at(edited, path).output[0][:, 4] *= 3
    saved, _ = sweep(edited, clean, share_prefixes=share)

    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[:, 4] *= 3
        return hidden

    for position, logits in saved.items():
        changes = {
            (path, "output"): change,
            (blocks_of(model)[1], "output"): patched(position, VECTORS[position]),
        }
        assert_close(logits, alone(model, clean, [END], changes)[END][0, -1], position)


@pytest.mark.xfail(
    strict=True, raises=insitu.InsituError, reason="how values lie is found out only once"
)
def test_another_attention_implementation_from_now_on(own_model: LanguageModel) -> None:
    model = own_model
    (clean,) = prompts(1)
    sweep(model, clean, share_prefixes=True)
    model.module.set_attn_implementation("eager")
    attention = HEAD_INPUT[model.config.model_type].format(2).rpartition(".")[0]
    with model.trace() as tracer:
        patterns = []
        for ids in prompts(2):
            with tracer.invoke(ids):
                patterns.append(at(model, attention).output[1].save())
    assert [pattern.value.shape for pattern in patterns] == [(1, 4, LENGTH, LENGTH)] * 2


@SHARING
def test_training_mode_runs_each_prompt_with_its_own_dropout(share: bool | None) -> None:
    model = make("gpt2")
    (clean,) = prompts(1)
    sweep(model, clean, share_prefixes=share)
    model.module.train()
    with pytest.warns(UserWarning, match="training mode"):
        torch.manual_seed(3)
        saved, tracer = sweep(model, clean, share_prefixes=share)
    torch.manual_seed(3)
    for position, logits in saved.items():
        assert torch.equal(logits.value, swept(model, clean, position))
    assert len(tracer.plan.passes) == 3


@SHARING
def test_dropout_that_is_switched_on_apart_from_the_rest(share: bool | None) -> None:
    """As one does to see how sure a model is: the model is in eval mode, its dropout is not."""
    model = make("gpt2")
    (clean,) = prompts(1)
    sweep(model, clean, share_prefixes=share)
    for part in model.module.modules():
        if isinstance(part, nn.Dropout):
            part.train()
    with pytest.warns(UserWarning, match="training mode"):
        torch.manual_seed(3)
        saved, _ = sweep(model, clean, share_prefixes=share)
    torch.manual_seed(3)
    for position, logits in saved.items():
        assert torch.equal(logits.value, swept(model, clean, position))


def added(hidden: torch.Tensor) -> torch.Tensor:
    return hidden + VECTORS[1]


def added_at_the_last(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[:, -1] += VECTORS[1]
    return hidden


def added_early(hidden: torch.Tensor) -> torch.Tensor:
    hidden = hidden.clone()
    hidden[:, 2] += VECTORS[1]
    return hidden


@pytest.mark.parametrize("change", [added, added_at_the_last, added_early])
def test_hooks_of_the_users_own(own_model: LanguageModel, change: Change) -> None:
    model = own_model
    (clean,) = prompts(1)

    def hook(part: nn.Module, args: Any, output: Any) -> Any:
        new = change(first(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    for path in blocks_of(model):
        at(model, path).module.register_forward_hook(hook)
    saved, _ = sweep(model, clean, share_prefixes=True)
    for position, logits in saved.items():
        assert_close(logits, swept(model, clean, position), position)


def state_of(module: nn.Module) -> list[Any]:
    """All that hangs on the modules of a model."""
    found: list[Any] = [(id(tensor), tensor.clone()) for tensor in module.state_dict().values()]
    for part in module.modules():
        for name, value in vars(part).items():
            found.append((name, list(value.items()) if isinstance(value, dict) else value))
    return found


def same_state(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a[1], b[1]) if isinstance(a[1], torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_error_leaves_the_model_as_it_was(
    own_model: LanguageModel, error: type[BaseException], layer: int
) -> None:
    """In the pass that is shared, where another goes on from it, and in that one."""
    model = own_model
    (clean,) = prompts(1)
    blocks = blocks_of(model)
    expected, _ = sweep(model, clean, share_prefixes=True)
    before = state_of(model.module)

    def fail(value: torch.Tensor) -> torch.Tensor:
        raise error("mine")

    with pytest.raises((error, insitu.ExecutionError), match="mine"):
        with model.trace(share_prefixes=True) as tracer:
            for position in (9, 10, 11):
                with tracer.invoke(clean):
                    at(model, blocks[1]).output[0][:, position] = VECTORS[position]
                    failed = model.lm_head.output[0, -1].save()
                    if position == 10:
                        insitu.apply(fail, at(model, blocks[layer]).output[0]).save()
    assert same_state(before, state_of(model.module))
    with pytest.raises(insitu.NoValueError):
        _ = failed.value
    again, _ = sweep(model, clean, share_prefixes=True)
    for position, logits in again.items():
        assert torch.equal(logits.value, expected[position].value)


def test_sweeps_in_two_threads(model: LanguageModel) -> None:
    clean = prompts(2)
    expected = [{p: swept(model, ids, p) for p in (9, 10, 11)} for ids in clean]
    failures: list[object] = []

    def work(number: int) -> None:
        try:
            for repeat in range(6):
                share = [True, None, False][(repeat + number) % 3]
                saved, _ = sweep(model, clean[number], share_prefixes=share)
                for position, logits in saved.items():
                    assert_close(logits, expected[number][position], (number, position))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_loop_of_sweeps_with_other_data(model: LanguageModel) -> None:
    """Plans are found again, also with blocks of other form in between."""
    path = blocks_of(model)[1]
    for repeat in range(8):
        clean, source = prompts(2 + repeat)[:2]
        saved = []
        with model.trace(share_prefixes=True if repeat % 4 else None) as tracer:
            with tracer.invoke(source):
                donor = at(model, path).output[0]
            for position in (9, 10, 11) if repeat % 3 else (4, 10):
                with tracer.invoke(clean if repeat != 5 else source):
                    at(model, path).output[0][:, position] = donor[:, position] * repeat
                    saved.append((position, model.lm_head.output[0, -1].save()))
        (donated,) = alone(model, source, [(path, "output")]).values()
        for position, logits in saved:
            change = {(path, "output"): patched(position, donated[:, position] * repeat)}
            ids = clean if repeat != 5 else source
            expected = alone(model, ids, [END], change)[END][0, -1]
            assert_close(logits, expected, (repeat, position))


# --- what looks at all positions, though it does not seem so


LOOKS: dict[str, tuple[str, str, Callable[[Any], Any]]] = {
    "the hidden states, counted from the end": ("gpt2", "transformer.h.2", lambda x: x[-1]),
    "a head of all positions": (
        "qwen3", "model.layers.2.self_attn.q_norm", lambda x: x[..., -1, :]
    ),
    "a feature of all positions": ("gpt2", "transformer.h.2.mlp", lambda x: x[..., -1]),
    "the last of its rows": ("llama", "model.layers.2.mlp", lambda x: x[-1]),
    "a position by a tensor": (
        "gpt2", "transformer.h.2.ln_1", lambda x: x[:, torch.tensor([0, 1])]
    ),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_reads_of_all_positions_where_only_late_ones_differ(look: str) -> None:
    name, path, pick = LOOKS[look]
    model = kept(name)
    (clean,) = prompts(1)
    written = blocks_of(model)[0]
    saved = {}
    with model.trace(share_prefixes=True) as tracer:
        for position in (9, 10, 11):
            with tracer.invoke(clean):
                at(model, written).output[0][:, position] = VECTORS[position]
                saved[position] = pick(at(model, path).output).save()
    for position, found in saved.items():
        change = {(written, "output"): patched(position, VECTORS[position])}
        (expected,) = alone(model, clean, [(path, "output")], change).values()
        expected = expected if path in blocks_of(model) else pick(expected)
        assert_close(found, expected, position)
    assert tracer.plan.passes[-1].skipped


# --- calls of the model's modules beside the forward


def lens(model: Any, hidden: Any) -> Any:
    return model.lm_head(model.transformer.ln_f(hidden))


def first_block(model: Any, hidden: Any) -> Any:
    return first_of(model.transformer.h[0](hidden))


def second_block(model: Any, hidden: Any) -> Any:
    return first_of(model.transformer.h[1](hidden))


def third_block(model: Any, hidden: Any) -> Any:
    return first_of(model.transformer.h[2](hidden))


def first_of(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output[0]


@SHARING
@pytest.mark.parametrize("apply", [lens, first_block, second_block, third_block])
def test_modules_that_are_applied_to_values(
    apply: Callable[[Any, Any], Any], share: bool | None
) -> None:
    """Which of them the forward leaves out, and what it unembeds, is nothing to them."""
    model = kept("gpt2")
    (clean,) = prompts(1)
    saved = {}
    with model.trace(share_prefixes=share) as tracer:
        for position in (9, 10, 11):
            with tracer.invoke(clean):
                early = insitu.apply(
                    lambda x: apply(model.module, x), model.transformer.h[0].output[0]
                )
                model.transformer.h[1].output[0][:, position] = VECTORS[position]
                late = insitu.apply(
                    lambda x: apply(model.module, x), model.transformer.h[3].output[0]
                )
                logits = model.lm_head.output[0, -1].save()
                saved[position] = early.save(), late.save(), logits
    paths = [f"transformer.h.{layer}" for layer in range(4)]
    for position, (early, late, logits) in saved.items():
        change = {(paths[1], "output"): patched(position, VECTORS[position])}
        seen = alone(model, clean, [(paths[0], "output"), (paths[3], "output"), END], change)
        with torch.no_grad():
            assert_close(early, apply(model.module, seen[paths[0], "output"]))
            assert_close(late, apply(model.module, seen[paths[3], "output"]))
        assert_close(logits, seen[END][0, -1])


def test_a_lens_in_a_batch_beside_the_last_logits() -> None:
    model = kept("gpt2")
    saved = []
    several = prompts(3, (1, 12), (1, 12), (1, 9))
    with model.trace() as tracer:
        for ids in several:
            with tracer.invoke(ids):
                seen = lens(model, model.transformer.h[1].output[0]).save()
                saved.append((seen, model.lm_head.output[0, -1].save()))
    for ids, (seen, logits) in zip(several, saved, strict=True):
        expected = alone(model, ids, [("transformer.h.1", "output"), END])
        with torch.no_grad():
            assert_close(seen, lens(model.module, expected["transformer.h.1", "output"]))
        assert_close(logits, expected[END][0, -1])


def test_plain_calls_in_another_thread_are_left_alone() -> None:
    """They may come while blocks are left out and few positions are unembedded."""
    model = kept("gpt2")
    clean, other = prompts(2)
    expected = alone(model, other, [END])[END]
    sweep(model, clean, share_prefixes=True)  # what is found out once is not beside them
    begun, done = threading.Event(), threading.Event()
    found: list[object] = []

    def work() -> None:
        begun.wait(10)
        try:
            with torch.no_grad():
                found.append(model.module(other, use_cache=False).logits)
        except Exception as failure:
            found.append(failure)
        done.set()

    def wait(value: torch.Tensor) -> torch.Tensor:
        begun.set()
        done.wait(10)
        return value

    thread = threading.Thread(target=work)
    thread.start()
    saved = {}
    with model.trace(share_prefixes=True) as tracer:
        for position in (9, 10, 11):
            with tracer.invoke(clean):
                model.transformer.h[1].output[0][:, position] = VECTORS[position]
                if position == 10:
                    insitu.apply(wait, model.transformer.h[2].output[0][:, -1]).save()
                saved[position] = model.lm_head.output[0, -1].save()
    thread.join()
    for position, logits in saved.items():
        assert_close(logits, swept(model, clean, position), position)
    assert isinstance(found[0], torch.Tensor), found[0]
    assert torch.equal(found[0], expected)


# --- what the plan says


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "opt", "bloom", "mistral", "gemma2", "qwen3", "mixtral"]
)
def test_counted_operations_are_those_that_are_done(name: str, share: bool) -> None:
    model = make(name)
    model.module.set_attn_implementation("eager")  # of which PyTorch counts all operations
    if hasattr(model.module, "set_experts_implementation"):
        model.module.set_experts_implementation("eager")
    (clean,) = prompts(1, (1, 30))
    blocks = blocks_of(model)
    for _ in range(2):  # the second time nothing has to be found out
        with FlopCounterMode(display=False) as counter:
            with model.trace(share_prefixes=share) as tracer:
                for path in blocks[1:]:
                    for position in (10, 20, 29):
                        with tracer.invoke(clean):
                            at(model, path).output[0][:, position] = VECTORS[position]
                            at(model, model.unembedding[0]).output[0, -1].save()
    plan = tracer.plan
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        alone(model, clean, [])
    naive = 3 * len(blocks[1:]) * counter.get_total_flops()
    assert plan.naive_flops == pytest.approx(naive, rel=0.05)


def test_the_plan_is_told_and_is_that_of_a_scan(model: LanguageModel) -> None:
    (clean,) = prompts(1)
    path = blocks_of(model)[1]

    def record(tracer: Any) -> None:
        for position in (9, 10, 11):
            with tracer.invoke(clean):
                at(model, path).output[0][:, position] = VECTORS[position]
                model.lm_head.output[0, -1].save()

    with model.trace(share_prefixes=True) as tracer:
        record(tracer)
    shared, rest = tracer.plan.passes
    count = len(blocks_of(model))
    assert (shared.rows, shared.positions, shared.run, shared.skipped) == (1, LENGTH, count, 0)
    assert (rest.rows, rest.positions, rest.run, rest.skipped) == (3, 3, count - 2, 2)
    head, *lines, sums = tracer.plan.explain().splitlines()
    assert head.split() == [
        "pass",
        "invocations",
        "rows",
        "positions",
        "blocks",
        "skipped",
        "GFLOP",
        "why",
    ]
    assert lines[0].split()[2:6] == ["1", "12", str(count), "0"]
    assert lines[1].split()[:6] == ["1", "0-2", "3", "3", str(count - 2), "2"]
    assert "each invocation alone" in sums

    def fail(*_: Any) -> None:
        raise AssertionError("a scan runs nothing")

    model.module.forward = fail
    try:
        with model.scan(share_prefixes=True) as scanned:
            record(scanned)
    finally:
        del model.module.forward
    assert scanned.plan.passes == tracer.plan.passes


# --- random experiments


class Write(NamedTuple):
    """What one invocation writes: a form, or a position of what another has at a block."""

    layer: int
    position: int
    form: int | None
    source: int
    source_layer: int


class Experiment(NamedTuple):
    """Which prompt each invocation has, what it writes, and which positions are read where."""

    prompts: list[int]
    writes: list[list[Write]]
    reads: list[list[tuple[str, int]]]


POOL = prompts(5, (1, 12), (1, 12), (1, 9), (2, 12), (1, 1))
PICKS: list[Callable[[Any], Any]] = [
    lambda x: x[:, -1],
    lambda x: x[0, -1, 3],
    lambda x: x[:, -2:],
    lambda x: x[..., 0],
    lambda x: x * 2,
    lambda x: x[-1:, 0],
]


@st.composite
def experiments(draw: Callable[..., Any], depth: int) -> Experiment:
    count = draw(st.integers(2, 6))
    chosen = draw(st.lists(st.integers(0, len(POOL) - 1), min_size=count, max_size=count))
    writes, reads = [], []
    for number in range(count):
        layers = draw(st.lists(st.integers(0, depth - 1), max_size=2, unique=True))
        forms = st.one_of(st.none(), st.integers(0, len(FORMS) - 1)) if number else st.just(0)
        length = POOL[chosen[number]].shape[1]
        own = []
        for layer in sorted(layers):
            position = draw(st.integers(-length, length - 1))
            form = draw(forms if length > 2 else st.just(None if number else 0))
            own.append(
                Write(
                    layer,
                    position,
                    form,
                    draw(st.integers(0, max(number - 1, 0))),
                    draw(st.integers(0, depth - 1)),
                )
            )
        writes.append(own)
        places = st.tuples(
            st.sampled_from(["head", "model", *map(str, range(depth))]),
            st.integers(0, len(PICKS) - 1),
        )
        reads.append(draw(st.lists(places, min_size=1, max_size=3)))
    return Experiment(chosen, writes, reads)


def run_experiment(model: LanguageModel, experiment: Experiment, **options: Any) -> list[list[Any]]:
    blocks, head = blocks_of(model), model.unembedding[0]
    saved = []
    with model.trace(**options) as tracer:
        invocations = [tracer.invoke(POOL[prompt]) for prompt in experiment.prompts]
        for invocation, writes, reads in zip(invocations, *experiment[1:], strict=True):
            for layer, position, form, source, source_layer in writes:
                if form is None:
                    with invocations[source]:
                        donor = at(model, blocks[source_layer]).output[0][0, -1]
                    with invocation:
                        at(model, blocks[layer]).output[0][:, position] = donor
                else:
                    with invocation:
                        FORMS[form](at(model, blocks[layer]), position)
            with invocation:
                own = []
                for place, pick in reads:
                    if place == "head":
                        value = at(model, head).output
                    elif place == "model":
                        value = logits_of(model)
                    else:
                        value = at(model, blocks[int(place)]).output[0]
                    own.append(PICKS[pick](value).save())
                saved.append(own)
    return saved


def expected_of(model: LanguageModel, experiment: Experiment) -> list[list[torch.Tensor]]:
    blocks, head = blocks_of(model), model.unembedding[0]
    places = [(path, "output") for path in blocks] + [(head, "output"), END]
    seen: list[dict[Place, torch.Tensor]] = []
    found = []
    for prompt, writes, reads in zip(*experiment, strict=True):
        change: dict[Place, Change] = {}
        for layer, position, form, source, source_layer in writes:
            if form is None:
                vector = seen[source][blocks[source_layer], "output"][0, -1]
                change[blocks[layer], "output"] = patched(position, vector)
            else:
                change[blocks[layer], "output"] = in_torch(FORMS[form], position)
        seen.append(alone(model, POOL[prompt], places, change))
        own = []
        for place, pick in reads:
            at_place = (head, "output") if place == "head" else END
            if place not in ("head", "model"):
                at_place = (blocks[int(place)], "output")
            own.append(PICKS[pick](seen[-1][at_place]))
        found.append(own)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_random_experiments(name: str) -> None:
    model = kept(name)

    @seed(int(os.environ.get("INSITU_SEED", "0")))
    @settings(
        max_examples=int(os.environ.get("INSITU_EXPERIMENTS", "40")), deadline=None, database=None
    )
    @given(
        experiments(len(blocks_of(model))), st.integers(1, 80), st.sampled_from([True, True, None])
    )
    def agree(experiment: Experiment, budget: int, share: bool | None) -> None:
        saved = run_experiment(model, experiment, max_tokens_per_pass=budget, share_prefixes=share)
        for own, right in zip(saved, expected_of(model, experiment), strict=True):
            for found, value in zip(own, right, strict=True):
                assert_close(found, value)

    agree()
