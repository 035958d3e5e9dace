"""Prompts that use values of each other, budgets, and what the plan says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from insitu import LanguageModel
from tests.conftest import tiny_gpt2
from tests.fidelity.alone import (
    END,
    LENGTH,
    SHARING,
    VECTORS,
    Change,
    Place,
    alone,
    assert_close,
    at,
    blocks_of,
    kept,
    make,
    patched,
    prompts,
)
from tests.thinning import sampled, thinned

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many


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


# --- budgets


@SHARING
@pytest.mark.parametrize("budget", sampled([1, 11, 12, 25, 40, 1000], [1, 12, 1000]))
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


# --- what the plan says


@pytest.mark.parametrize("share", sampled([True, False], [True]))
@pytest.mark.parametrize(
    "name",
    sampled(
        thinned(
            ["gpt2", "llama", "opt", "bloom", "mistral", "gemma2", "qwen3", "mixtral"],
            ["gpt2", "llama", "mixtral"],
        ),
        ["mixtral"],
    ),
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
                            at(model, model.traits.unembedding_paths[0]).output[0, -1].save()
    plan = tracer.plan
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        alone(model, clean, [])
    naive = 3 * len(blocks[1:]) * counter.get_total_flops()
    assert plan.naive_flops == pytest.approx(naive, rel=0.05)


def test_the_plan_is_told_and_is_that_of_a_scan(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    names = "pass invocations rows positions blocks skipped GFLOP why"
    assert " ".join(head.split()) == names
    assert lines[0].split()[2:6] == ["1", "12", str(count), "0"]
    assert lines[1].split()[:6] == ["1", "0-2", "3", "3", str(count - 2), "2"]
    assert "each invocation alone" in sums

    def fail(*_: Any) -> None:
        raise AssertionError("a scan runs nothing")

    # Of the class: a forward of the instance would be another model, of which nothing is known.
    with monkeypatch.context() as patched:
        patched.setattr(type(model.module), "forward", fail)
        with model.scan(share_prefixes=True) as scanned:
            record(scanned)
    assert scanned.plan.passes == tracer.plan.passes


def test_a_prompt_shares_no_write_that_another_use_of_it_has() -> None:
    """Three invocations of one prompt, of which one writes and lends what another prompt writes."""
    model = LanguageModel(tiny_gpt2())
    shared, other = torch.tensor([[75, 38, 76, 34]]), torch.tensor([[78, 59, 60, 16]])
    kept: list[torch.Tensor] = []
    mlp = model.module.transformer.h[3].mlp
    handle = mlp.register_forward_hook(lambda part, args, output: kept.append(output.clone()))
    with torch.no_grad():
        model.module(shared, use_cache=False)
    handle.remove()
    with model.trace() as tracer:
        target, source = tracer.invoke(other), tracer.invoke(shared)
        with source:
            value = model.transformer.h[3].mlp.output
        with target:
            model.transformer.h[2].attn.c_proj.output = value
        with source:
            model.transformer.h[2].mlp.dropout.output *= 0.5
            value.save()
        with target:
            model.transformer.h[2].mlp.c_proj.output[:].save()
        with tracer.invoke(shared):
            plain = model.transformer.h[3].mlp.output.save()
        with tracer.invoke(shared):
            model.transformer.h[3].mlp.act.output.save()
            first = model.transformer.h[0].ln_1.input
        with tracer.invoke(other):
            model.transformer.h[0].input = first
    assert torch.allclose(plain.value, kept[0], atol=1e-6)
