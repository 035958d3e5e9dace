"""Every architecture, read and changed, against plain hooks on the same model.

What runs alone is the same bit for bit; what shares a batch is so to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch

from insitu import LanguageModel, Model, ShapeError, UnknownShapeError
from tests.fidelity import twin
from tests.fidelity.twin import Place, tensors
from tests.fidelity.zoo import VOCABULARY, ZOO
from tests.fidelity.zoo.absent import WITH_EXPERTS, having, lacking

OLD = version("transformers").startswith("4.")
LOOPED_OVER = WITH_EXPERTS - {"llama4"}

pytestmark = pytest.mark.no_wire  # what is sent does not depend on the architecture

EVERY = pytest.mark.parametrize("name", ZOO)
LANGUAGE = pytest.mark.parametrize("name", [n for n, one in ZOO.items() if one.takes_text])
GENERATING = pytest.mark.parametrize("name", [n for n, one in ZOO.items() if one.generates])
LENGTHS = (3, 7, 12)


@cache
def model_of(name: str) -> Model:
    """One that tests share and leave as it is."""
    module = ZOO[name].make()
    return LanguageModel(module) if ZOO[name].takes_text else Model(module)


@cache
def blocks_of(name: str) -> list[list[str]]:
    """The paths of its blocks, stack by stack."""
    module = model_of(name).module
    stacks = ZOO[name].stacks_in(module)
    return [
        [f"{stack}.{layer}" for layer in range(len(module.get_submodule(stack)))]  # pyright: ignore
        for stack in stacks
    ]


def every_block(name: str) -> list[str]:
    return [path for stack in blocks_of(name) for path in stack]


def plain(name: str, inputs: Mapping[str, Any], **options: Any) -> twin.Run:
    """The oracle's run. Language models run without a cache, as in a trace."""
    model = model_of(name)
    if isinstance(model, LanguageModel) and model.traits.takes_use_cache:
        inputs = {**inputs, "use_cache": False}
    return twin.run(model.module, **options, **inputs)


def trace(name: str, inputs: Mapping[str, Any]) -> Any:
    """A block of a forward with these inputs."""
    model = model_of(name)
    if not isinstance(model, LanguageModel):
        return model.trace(**inputs)
    rest = dict(inputs)
    return model.trace(rest.pop("input_ids"), **rest)


def at(name: str, path: str) -> Any:
    handle: Any = model_of(name)
    for part in path.split(".") if path else ():
        handle = handle[part]
    return handle


def site(name: str, place: Place) -> Any:
    path, kind, call = place
    handle = at(name, path)
    return getattr(handle.call(call) if call else handle, kind)


def scores(output: Any) -> Any:
    """The logits in what a whole model returns."""
    return output["logits_per_image" if "logits_per_image" in output else "logits"]


def vector(name: str, seed: int = 0) -> torch.Tensor:
    """A direction in the residual stream, `(d_model,)`."""
    return torch.randn(16, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Any, expected: list[torch.Tensor], what: object) -> None:
    """Bit for bit; numbers that are none are the same too."""
    mine = list(tensors(found))
    assert [x.shape for x in mine] == [x.shape for x in expected], what
    for one, other in zip(mine, expected, strict=True):
        assert one.dtype == other.dtype, what
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), what


def assert_close(found: Any, expected: torch.Tensor, what: object) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    worst, scale = float((found - expected).abs().max()), max(float(expected.abs().max()), 0.1)
    assert worst <= 1e-5 * scale, (what, worst, scale)


def save_ends(name: str) -> dict[str, Any]:
    """What is at the ends, saved, of an invocation."""
    saved = {path: at(name, path).output[0].save() for path in every_block(name)}
    saved[""] = model_of(name).output[scores_name(name)].save()
    return saved


def scores_name(name: str) -> str:
    return "logits_per_image" if ZOO[name].kind == "contrastive" else "logits"


def plain_ends(name: str, inputs: Mapping[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    """What hooks see at the ends."""
    run = plain(name, inputs, read=every_block(name), **options)
    found = {path: run.seen[path, "output", 0][0] for path in every_block(name)}
    found[""] = run.result[scores_name(name)]
    return found


def assert_ends(saved: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    for path, value in expected.items():
        assert_same(saved[path].value, [value], path)


STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def generated(name: str, ids: torch.Tensor, **options: Any) -> twin.Run:
    """The oracle's generation of a prompt alone."""
    model = model_of(name)
    return twin.run(
        model.module,
        model.module.generate,  # pyright: ignore
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=model.traits.pad_id,  # pyright: ignore
        **{**STEPS, **options},
    )


# --- what is read


@EVERY
def test_inputs_and_outputs_of_all_modules_are_what_hooks_see(name: str) -> None:
    inputs = ZOO[name].inputs()
    expected = plain(name, inputs).seen
    blocks = {path for stack in blocks_of(name) for path in stack}
    with trace(name, inputs):
        saved = {place: site(name, place).save() for place, value in expected.items() if value}
    for place, proxy in saved.items():
        path, kind, _ = place
        value = proxy.value
        if path in blocks and kind == "output":
            hidden = expected[place][0]
            assert type(value) is tuple and hidden.ndim == 3, place
            assert hidden.shape[-1] == 16, place
            value = value[0]
            assert_same(value, [hidden], place)
        else:
            assert_same(value, expected[place], place)
    assert {path for path, kind, _ in saved if kind == "output"} >= blocks


@EVERY
def test_the_blocks_are_found(name: str) -> None:
    model = model_of(name)
    views = model.traits.block_views[False] if isinstance(model, LanguageModel) else model.views
    assert set(views) == {path for stack in blocks_of(name) for path in stack}


@pytest.mark.parametrize("name", [name for name in having("cache") if ZOO[name].generates])
def test_with_a_cache_a_block_gives_its_keys_and_values(name: str) -> None:
    shown, held = cached(name)
    assert held
    for stack in blocks_of(name):
        for layer, path in enumerate(stack):
            _, *more = shown[path]
            own = held.get(layer) if stack is blocks_of(name)[-1] else None  # an encoder has none
            assert len(more) == (own is not None), path
            for pair in more:
                assert_same(pair, own or [], path)
                assert all(tensor.ndim == 4 for tensor in pair)


@pytest.mark.parametrize("name", lacking("cache"))
def test_a_block_with_a_state_gives_no_keys_and_values(name: str) -> None:
    shown, held = cached(name)
    assert not held and all(len(output) == 1 for output in shown.values())
    with pytest.raises(ShapeError, match="tuple index out of range"):
        with model_of(name).generate(ZOO[name].inputs()["input_ids"], max_new_tokens=1):
            at(name, blocks_of(name)[-1][-1]).output[1].save()


def cached(name: str) -> tuple[dict[str, Any], dict[int, list[torch.Tensor]]]:
    """What blocks show in a step with a cache, and what keys and values that holds by layer."""
    model, ids = model_of(name), ZOO[name].inputs()["input_ids"]
    options = {**STEPS, "max_new_tokens": 1, "min_new_tokens": 1}
    expected = generated(name, ids, read=[], **options, return_dict_in_generate=True).result
    with model.generate(ids, **options):
        saved = {path: at(name, path).output.save() for path in every_block(name)}
    held = keys_and_values(expected.get("past_key_values", expected.get("cache_params")))
    return {path: one.value for path, one in saved.items()}, held


def keys_and_values(past: Any) -> dict[int, list[torch.Tensor]]:
    """What a cache holds, by layer, of whatever kind it is."""
    past = getattr(past, "self_attention_cache", past)
    layers = getattr(past, "layers", None)
    if layers is not None:
        pairs = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers]
    else:
        keys, values = getattr(past, "key_cache", ()), getattr(past, "value_cache", ())
        pairs = list(zip(keys, values, strict=True))
    return {
        layer: list(pair)
        for layer, pair in enumerate(pairs)
        if all(isinstance(x, torch.Tensor) and x.numel() for x in pair)
    }


# --- what is changed


def patching(at: int, source: torch.Tensor) -> twin.Change:
    """Puts a vector `(rows, d_model)` at a position, into a copy."""

    def patch(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, at] = source
        return hidden

    return patch


def steering(*directions: torch.Tensor) -> twin.Change:
    """Adds a vector `(d_model,)` at the last position, in each call the next of them."""
    left = iter(directions)

    def steer(hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[:, -1] += next(left)
        return hidden

    return steer


def ablating() -> twin.Change:
    """Puts zeros in the place of what the first call returns."""
    calls: list[None] = []

    def ablate(output: torch.Tensor) -> torch.Tensor | None:
        calls.append(None)
        return torch.zeros_like(output) if len(calls) == 1 else None

    return ablate


@EVERY
def test_hidden_states_of_another_input_are_patched_in(name: str) -> None:
    clean, other = ZOO[name].inputs(seed=1), ZOO[name].inputs(seed=2)
    for stack in blocks_of(name):
        path = stack[1]
        source = plain(name, other, read=[path]).seen[path, "output", 0][0]
        change = {path: patching(1, source[:, 1])}
        expected = plain_ends(name, clean, change=change)
        with trace(name, other):
            donor = at(name, path).output[0][:, 1].save()
        with trace(name, clean):
            at(name, path).output[0][:, 1] = donor
            saved = save_ends(name)
        assert_ends(saved, expected)


@EVERY
def test_a_part_of_a_block_is_ablated(name: str) -> None:
    inputs = ZOO[name].inputs()
    untouched = plain(name, inputs)
    for stack in blocks_of(name):
        for path in parts_of(stack[1], untouched):
            expected = plain_ends(name, inputs, change={path: ablating()})
            with trace(name, inputs):
                part = at(name, path)
                if path in untouched.bare:
                    part.output = torch.zeros_like(part.output)
                elif not shapes_are_known(name):
                    # What its experts are given depends on weights, and that they are as they are
                    # is not known before the run: then all of a tuple is assigned.
                    with pytest.raises(UnknownShapeError, match="assign all of a tuple"):
                        part.output[0] = torch.zeros_like(part.output[0])
                    others = [part.output[n] for n in range(1, untouched.lengths[path])]
                    part.output = (torch.zeros_like(part.output[0]), *others)
                else:
                    part.output[0] = torch.zeros_like(part.output[0])
                saved = save_ends(name)
            assert_ends(saved, expected)


@cache
def shapes_are_known(name: str) -> bool:
    """Whether shapes are known before a run: not if experts are looped over that have tokens."""
    try:
        with trace(name, ZOO[name].inputs()) as tracer:
            shape = tracer.output[scores_name(name)].shape
            tracer.output[scores_name(name)].save()
    except UnknownShapeError:
        assert OLD and name in LOOPED_OVER
        return False
    assert shape[-1] in (VOCABULARY, 1, 5)
    return True


def parts_of(block: str, run: twin.Run) -> list[str]:
    """The modules that a block calls itself."""
    called = [
        path
        for path, kind, _ in run.seen
        if path.startswith(f"{block}.") and kind == "output" and run.seen[path, kind, 0]
    ]
    called = list(dict.fromkeys(called))
    return [p for p in called if not any(p.startswith(f"{q}.") for q in called)]


@EVERY
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_vector_steers(name: str, how: str) -> None:
    inputs, direction = ZOO[name].inputs(), vector(name)
    for stack in blocks_of(name):
        path = stack[-1]
        change = {path: lambda hidden: hidden + direction}
        expected = plain_ends(name, inputs, change=change)
        with trace(name, inputs):
            block = at(name, path)
            if how == "replaced":
                block.output = block.output[0] + direction
            else:
                hidden = block.output[0]
                hidden += direction
            saved = save_ends(name)
        assert_ends(saved, expected)


@LANGUAGE
def test_what_a_model_notes_of_its_blocks_is_what_was_written(name: str) -> None:
    path, direction = blocks_of(name)[-1][0], vector(name)
    inputs = {**ZOO[name].inputs(), "output_hidden_states": True}
    ends: dict[str, twin.Change] = {path: lambda hidden: hidden + direction}
    result = plain(name, inputs, read=[], change=ends).result
    kind = "decoder_hidden_states" if "decoder_hidden_states" in result else "hidden_states"
    for _ in range(2):  # newer versions of Transformers put their hooks there when first asked
        with trace(name, inputs):
            block, output = at(name, path), model_of(name).output
            block.output = block.output[0] + direction
            noted = [output[kind][layer].save() for layer in range(len(result[kind]))]
        assert_same([one.value for one in noted], list(result[kind]), kind)


@EVERY
def test_gradients_reach_every_block(name: str) -> None:
    inputs, blocks = ZOO[name].inputs(), every_block(name)
    run = plain(name, inputs, read=[], graded=blocks)
    loss = (run.result[scores_name(name)] ** 2).sum()
    kept = [run.kept[path] for path in blocks]
    expected = torch.autograd.grad(loss, kept, allow_unused=True)
    # Of a tower of images the model may use all blocks but the last.
    unused = [path for path, found in zip(blocks, expected, strict=True) if found is None]
    assert len(unused) <= 1 and (not unused or unused[0] == blocks_of(name)[0][-1])
    blocks, expected = (
        [p for p in blocks if p not in unused],
        [g for g in expected if g is not None],
    )
    with trace(name, inputs):
        saved = [at(name, path).output[0].grad.save() for path in blocks]
        (model_of(name).output[scores_name(name)] ** 2).sum().backward()
    for path, proxy, gradient in zip(blocks, saved, expected, strict=True):
        assert float(gradient.abs().max()) > 0, path
        assert_same(proxy.value, [gradient], path)


# --- several invocations


def given(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a forward of a prompt alone is given.

    The decoder beside an encoder begins with the token with which a generation begins.
    """
    if ZOO[name].kind == "encoder-decoder":
        return {"input_ids": ids, "decoder_input_ids": torch.tensor([[3]])}
    return {"input_ids": ids}


# With Transformers 4 padding changes the pieces in which this model processes a prompt, so longer
# prompts share no batch.
IN_PIECES = {"zamba2"}


@LANGUAGE
def test_prompts_of_different_length_do_not_see_each_other(name: str) -> None:
    model = model_of(name)
    prompts = [ZOO[name].inputs(1, length, length)["input_ids"] for length in LENGTHS]
    saved = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(save_ends(name))
    for ids, own in zip(prompts, saved, strict=True):
        expected = plain_ends(name, given(name, ids))
        for path, value in expected.items():
            assert_close(own[path].value, value, path)
    assert len(tracer.plan.passes) == (3 if name in IN_PIECES and OLD else 1)


@LANGUAGE
def test_a_patch_between_prompts_of_a_batch_reaches_one_of_them(name: str) -> None:
    model, path = model_of(name), blocks_of(name)[-1][0]
    draws = [ZOO[name].inputs(1, length, length) for length in (5, 9, 7)]
    inputs = [given(name, one["input_ids"]) for one in draws]
    source = plain(name, inputs[0], read=[path]).seen[path, "output", 0][0]
    change = {path: patching(0, source[:, -1])}
    with model.trace() as tracer:
        with tracer.invoke(inputs[0]["input_ids"]):
            donor = at(name, path).output[0][:, -1]
        with tracer.invoke(inputs[1]["input_ids"]):
            at(name, path).output[0][:, 0] = donor
            patched = save_ends(name)
        with tracer.invoke(inputs[2]["input_ids"]):
            untouched = save_ends(name)
    for saved, expected in (
        (patched, plain_ends(name, inputs[1], change=change)),
        (untouched, plain_ends(name, inputs[2])),
    ):
        for end, value in expected.items():
            assert_close(saved[end].value, value, end)


@LANGUAGE
def test_gradients_of_several_prompts_are_their_own(name: str) -> None:
    model, blocks = model_of(name), every_block(name)
    prompts = [ZOO[name].inputs(1, length, length)["input_ids"] for length in LENGTHS]
    saved = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append([at(name, path).output[0].grad.save() for path in blocks])
                (model.output.logits**2).sum().backward()
    for ids, own in zip(prompts, saved, strict=True):
        inputs = given(name, ids)
        run = plain(name, inputs, read=[], graded=blocks)
        loss = (run.result.logits**2).sum()
        gradients = torch.autograd.grad(loss, [run.kept[path] for path in blocks])
        for path, proxy, gradient in zip(blocks, own, gradients, strict=True):
            assert_close(proxy.value, gradient, path)


# --- generation


@GENERATING
def test_a_generation_is_changed_in_each_step(name: str) -> None:
    model, path, end = (
        model_of(name),
        blocks_of(name)[-1][1],
        model_of(name).traits.unembedding_paths[0],
    )
    ids, directions = ZOO[name].inputs()["input_ids"], [vector(name, seed) for seed in range(3)]
    change = {path: steering(*directions)}
    expected = generated(name, ids, read=[*blocks_of(name)[-1], end], change=change)
    with model.generate(ids, **STEPS) as generator:
        saved = []
        for step in generator.steps:
            at(name, path).output[0][:, -1] += directions[step]
            hidden = [at(name, block).output[0].save() for block in blocks_of(name)[-1]]
            saved.append((at(name, end).output.save(), hidden))
    assert torch.equal(generator.output, expected.result)
    for step, (logits, hidden) in enumerate(saved):
        assert_same(logits.value, expected.seen[end, "output", step], step)
        for block, proxy in zip(blocks_of(name)[-1], hidden, strict=True):
            assert_same(proxy.value, expected.seen[block, "output", step][:1], (block, step))


# Padding before a prompt is not hidden from these: they have no mask, or none in the steps after
# the prompt. Each has its own pass.
UNMASKED = {"rwkv", "mamba"} if OLD else {"rwkv"}
# Of these the cache, which is a part of a block's output, holds fewer positions than a prompt has.
WINDOWED = {"mistral", "gemma2", "gemma3", "gpt-oss", "llama4"}


@GENERATING
def test_generations_of_several_prompts_do_not_see_each_other(name: str) -> None:
    model, changed, end = model_of(name), blocks_of(name)[0][0], blocks_of(name)[-1][-1]
    prompts = [ZOO[name].inputs(1, length, length)["input_ids"] for length in LENGTHS]
    direction, saved, invokers = vector(name), [], []
    with model.generate(**STEPS) as generator:
        for number, ids in enumerate(prompts):
            with generator.invoke(ids) as invoker:
                invokers.append(invoker)
                if number == 1:
                    at(name, changed).output[0][:, -1] += direction
                saved.append(at(name, end).output[0].save())
    apart = UNMASKED | WINDOWED | (IN_PIECES if OLD else set())
    assert len(generator.plan.passes) == (3 if name in apart else 1)
    still = torch.zeros_like(direction)
    for number, ids in enumerate(prompts):
        change = {changed: steering(direction, still, still)} if number == 1 else {}
        expected = generated(name, ids, read=[end], change=change)
        assert torch.equal(invokers[number].output, expected.result)
        assert_close(saved[number].value, expected.seen[end, "output", 0][0], number)


@GENERATING
def test_steps_of_several_generations_do_not_see_each_other(name: str) -> None:
    model, changed, end = model_of(name), blocks_of(name)[-1][1], blocks_of(name)[-1][-1]
    prompts = [ZOO[name].inputs(1, length, length)["input_ids"] for length in (3, 7)]
    direction, saved = vector(name), []
    with model.generate(**STEPS) as generator:
        for number, ids in enumerate(prompts):
            with generator.invoke(ids) as invoker:
                for step in invoker.steps:
                    if number == 1:
                        at(name, changed).output[0][:, -1] += direction
                    saved.append((number, step, at(name, end).output[0].save()))
    directions = [direction] * 3
    changes = [{}, {changed: steering(*directions)}]
    runs = [
        generated(name, ids, read=[end], change=change)
        for ids, change in zip(prompts, changes, strict=True)
    ]
    assert torch.equal(generator.output[:, -3:], torch.cat([run.result[:, -3:] for run in runs]))
    for number, step, proxy in saved:
        assert_close(proxy.value, runs[number].seen[end, "output", step][0], (number, step))
