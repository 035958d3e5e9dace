"""Models with edits, dropout or hooks, calls beside the run, errors and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu import LanguageModel
from tests.fidelity.alone import (
    END,
    LENGTH,
    SHARING,
    VECTORS,
    Change,
    alone,
    assert_close,
    at,
    blocks_of,
    first,
    kept,
    make,
    patched,
    prompts,
    sweep,
    swept,
)
from tests.thinning import sampled

pytestmark = pytest.mark.no_wire  # it counts passes, and the values are many


@pytest.mark.parametrize("own_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
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


@pytest.mark.parametrize("own_model", sampled(["gpt2", "llama"], ["llama"]), indirect=True)
def test_another_attention_implementation_from_now_on(own_model: LanguageModel) -> None:
    model = own_model
    (clean,) = prompts(1)
    sweep(model, clean, share_prefixes=True)
    model.module.set_attn_implementation("eager")
    name = "attn" if model.config.model_type == "gpt2" else "self_attn"
    attention = f"{blocks_of(model)[2]}.{name}"
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


@pytest.mark.parametrize("error", sampled([ValueError, KeyboardInterrupt], [KeyboardInterrupt]))
@pytest.mark.parametrize("layer", sampled([0, 1, 2], [1]))
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

    failed = {}
    with pytest.raises((error, insitu.ExecutionError), match="mine"):
        with model.trace(share_prefixes=True) as tracer:
            for position in (9, 10, 11):
                with tracer.invoke(clean):
                    at(model, blocks[1]).output[0][:, position] = VECTORS[position]
                    failed[position] = model.lm_head.output[0, -1].save()
                    if position == 10:
                        insitu.apply(fail, at(model, blocks[layer]).output[0]).save()
    assert same_state(before, state_of(model.module))
    for position in (10,) if error is ValueError else (9, 10, 11):
        with pytest.raises(insitu.NoValueError):
            _ = failed[position].value
    for position in (9, 11) if error is ValueError else ():  # what fails concerns itself alone
        torch.testing.assert_close(failed[position].value, swept(model, clean, position))
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
