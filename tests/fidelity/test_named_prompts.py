"""Names in runs of several prompts and of several steps, on every architecture.

What a prompt shows in a batch is what hooks see, and what the names show, where it is alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.fidelity.named import (
    attention_roles,
    by_heads,
    changed_place,
    close,
    eager_is_expected,  # noqa: F401
    kept,
    last_blocks,
    opened,
    plain_forward,
    tapped,
    there,
    values_of,
)
from tests.fidelity.test_architectures import IN_PIECES, OLD
from tests.fidelity.zoo import ZOO
from tests.fidelity.zoo.layers import layer

pytestmark = pytest.mark.no_wire  # what is sent does not depend on the architecture

LANGUAGE = pytest.mark.parametrize("name", [name for name, one in ZOO.items() if one.takes_text])
GENERATING = pytest.mark.parametrize("name", [name for name, one in ZOO.items() if one.generates])
LENGTHS = (3, 8, 5)
# Something of theirs does not tell which of its axes are positions of a prompt.
UNCUT = {("mpt", False), ("gpt-oss", True), *([("jamba", True)] if OLD else [])}
# With some versions of Transformers it keeps what all its keys and values are made of anew.
REBUILT = set() if OLD else {"deepseek-v3"}
# Its biases of positions count from the last key that there is.
RELATIVE = {"mpt"}
STEPS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
LAYERS = ("attention.out", "cross_attention.out", "mlp.out")


def alone(name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a forward of a prompt alone is given: a decoder begins as a generation does."""
    begins = {"decoder_input_ids": torch.tensor([[3]])}
    return {"input_ids": ids, **(begins if ZOO[name].kind == "encoder-decoder" else {})}


LIMIT = 2e-5  # how far off rounding may be


def saved_of(block: Any, step: int = 0) -> dict[tuple[str, str], Any]:
    """All that has a name in a block; an encoder's keys and values only where they are made."""
    return {
        (key, of): getattr(part, of).save()
        for key, part, of in values_of(block)
        if not step or key not in ("cross_attention.k", "cross_attention.v")
    }


def decoding(name: str) -> list[Any]:
    """The blocks that run in every step."""
    stack = ZOO[name].stacks_in(kept(name).module)[-1]
    return [block for block in last_blocks(name, kept(name)) if block.path.startswith(stack)]


@LANGUAGE
def test_prompts_of_a_batch_show_by_name_what_they_do_alone(name: str) -> None:
    model = kept(name)
    prompts = [ZOO[name].inputs(1, length)["input_ids"] for length in LENGTHS]
    for block in last_blocks(name, model):
        with model.trace() as tracer:
            saved = []
            for ids in prompts:
                with tracer.invoke(ids):
                    saved.append((saved_of(block), model.logits.save()))
        with_experts = "experts" in list(block.role)
        apart = (name, with_experts) in UNCUT or (OLD and name in IN_PIECES)
        assert len(tracer.plan.passes) == (3 if apart else 1)
        for ids, (found, logits) in zip(prompts, saved, strict=True):
            inputs = alone(name, ids)
            layers = {"block": block.module, **{r: layer(block.module, r) for r in LAYERS}}
            with torch.no_grad(), tapped(layers) as seen:
                close(logits.value, plain_forward(name, inputs), name, LIMIT)
            with opened(model, name, inputs):
                own = saved_of(block)
            assert own.keys() == found.keys()
            for place, value in own.items():
                same(found[place].value, value.value, (block.path, *place), LIMIT)
            for place, value in hooked_values(block, seen).items():
                close(found[place].value, value, f"{block.path} {place}", LIMIT)


def same(found: torch.Tensor, expected: torch.Tensor, what: Any, limit: float = 2e-5) -> None:
    """As `close`, but for what is masked, in whatever way."""
    assert found.shape == expected.shape, what
    masked = expected < -1e4
    assert torch.equal(found < -1e4, masked), what
    close(found.masked_fill(masked, 0), expected.masked_fill(masked, 0), str(what), limit)


def hooked_values(
    block: Any, seen: Mapping[tuple[str, str], list[torch.Tensor]]
) -> dict[tuple[str, str], torch.Tensor]:
    """What has a name, as hooks see it."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    (leaving,) = seen["block", "output"]
    if there(block, "residual_in"):
        found[".residual_in", "residual_in"] = seen["block", "input"][0]
        found[".residual_out", "residual_out"] = leaving
    for role in attention_roles(block):
        given = seen[f"{role}.out", "input"][0].view(*leaving.shape[:2], -1)
        found[f"{role}.z", "z"] = by_heads(given, block.role[role].W_O.shape[0])
    if seen["mlp.out", "input"]:
        found["mlp.post", "post"] = seen["mlp.out", "input"][0].view(*leaving.shape[:2], -1)
    assert found
    return found


def halved(role: str, heads: int, at: slice) -> Any:
    """Takes half of something away at some positions: of a head, or of all."""

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        if role == "attention.out":
            value.unflatten(-1, (heads, -1))[..., at, 1, :] *= 0.5
        else:
            value[..., at, :] *= 0.5
        return value

    return change


@LANGUAGE
def test_what_is_written_by_name_for_a_prompt_of_a_batch_reaches_it_alone(name: str) -> None:
    model = kept(name)
    prompts = [ZOO[name].inputs(1, length)["input_ids"] for length in LENGTHS]
    for block in last_blocks(name, model):
        role, module, part, key = changed_place(block)
        heads = part.W_O.shape[0] if key == "z" else 0
        with model.trace() as tracer:
            saved = []
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids):
                    if number == 1:
                        value = getattr(part, key)
                        if key == "z":
                            value[:, 1] *= 0.5
                        else:
                            value *= 0.5
                    saved.append(model.logits.save())
        change = {role: halved(role, heads, slice(None))}
        for number, (ids, found) in enumerate(zip(prompts, saved, strict=True)):
            inputs = alone(name, ids)
            with torch.no_grad():
                untouched = plain_forward(name, inputs)
                how = {"after" if role == "mixer" else "before": change if number == 1 else {}}
                with tapped({role: module}, **how):
                    expected = plain_forward(name, inputs)
            assert torch.equal(expected, untouched) == (number != 1)
            close(found.value, expected, block.path, LIMIT)


@GENERATING
def test_each_step_of_a_generation_is_read_and_written_by_name(name: str) -> None:
    model, ids = kept(name), ZOO[name].inputs(1, 7)["input_ids"]
    lengths = [1 if ZOO[name].kind == "encoder-decoder" else 7, 1, 1]
    for block in decoding(name):
        role, module, part, key = changed_place(block)
        heads = part.W_O.shape[0] if key == "z" else 0
        change = {role: halved(role, heads, slice(-1, None))}
        how = {"after" if role == "mixer" else "before": change}
        with tapped({role: module, "block": block.module}, **how) as seen:
            expected = model.module.generate(
                ids, attention_mask=torch.ones_like(ids), pad_token_id=1, **STEPS
            )
        with model.generate(ids, **STEPS) as generator:
            saved = []
            for _ in generator.steps:
                value = getattr(part, key)
                if key == "z":
                    value[:, 1, -1] *= 0.5
                else:
                    value[:, -1] *= 0.5
                others = there(block, "residual_in", "residual_out")
                saved.append((value.save(), [getattr(block, of).save() for of in others]))
        assert torch.equal(generator.output, expected)
        for step, (value, others) in enumerate(saved):
            found = seen[role, "output" if role == "mixer" else "input"][step]
            found = found.view(1, lengths[step], -1)
            close(value.value, by_heads(found, heads) if heads else found, f"{block.path} {step}")
            for one, kind in zip(others, ("input", "output"), strict=False):
                close(one.value, seen["block", kind][step], f"{block.path} {kind} {step}")


@GENERATING
def test_what_has_a_name_in_a_step_is_what_it_is_in_one_forward_of_all_steps(name: str) -> None:
    model, ids = kept(name), ZOO[name].inputs(1, 7)["input_ids"]
    limit = 1e-3 if OLD and name in IN_PIECES else 1e-4  # steps of the model's own are so far off
    for block in decoding(name):
        with model.generate(ids, **STEPS) as generator:
            saved = [saved_of(block, step) for step in generator.steps]
        (tokens,) = generator.output
        inputs = {"input_ids": tokens[None, :-1]}
        if ZOO[name].kind == "encoder-decoder":
            inputs = {"input_ids": ids, "decoder_input_ids": tokens[None, :-1]}
        with opened(model, name, inputs):
            whole = saved_of(block)
        end = 0
        for step, found in enumerate(saved):
            start, end = end, tokens.shape[0] - 3 + step
            for (key, of), value in found.items():
                expected = whole[key, of].value
                if key in ("cross_attention.k", "cross_attention.v"):
                    part = expected
                elif key in ("attention.k", "attention.v") and name in REBUILT:
                    part = expected[:, :, :end]
                else:
                    axis = 2 if expected.ndim == 4 else 1
                    part = expected.narrow(axis, start, end - start)
                if key in ("attention.scores", "attention.pattern"):
                    part = part[..., :end][..., -value.value.shape[-1] :]  # a window
                one = value.value
                if of == "scores" and name in RELATIVE:
                    one, part = (x - x.amax(-1, keepdim=True) for x in (one, part))
                same(one, part, (block.path, step, key), limit)
