"""Sweeps over layers, positions and heads, whatever of them is shared and left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from insitu import LanguageModel
from tests.fidelity.alone import (
    END,
    GENERATORS,
    LENGTH,
    SHARES,
    SHARING,
    VECTORS,
    alone,
    assert_close,
    at,
    blocks_of,
    kept,
    logits_of,
    make,
    patched,
    prompts,
)
from tests.fidelity.forms import FORMS, in_torch, twice
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many


@SHARING
@pytest.mark.parametrize("name", sampled(GENERATORS, ["gpt2", "llama", "mamba", "bloom"]))
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
    if share and name not in ("opt", "mixtral"):  # of which it depends on the version
        assert (skipped > 0) == (name in SHARES), tracer.plan.explain()
    if share is False:
        assert not skipped


@SHARING
@pytest.mark.parametrize("name", [*sorted(SHARES), "both ways"])
def test_only_late_positions_are_computed_where_early_ones_are_alike(
    name: str, share: bool | None
) -> None:
    model = kept(name)
    (clean,) = prompts(1)
    path, last, head = blocks_of(model)[0], blocks_of(model)[-1], model.traits.unembedding_paths[0]
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
    if share and name in SHARES:  # of the other one, all positions differ
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


@pytest.mark.parametrize("model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
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
