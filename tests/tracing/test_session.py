from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from insitu import (
    BlockError,
    ExecutionError,
    LanguageModel,
    NoValueError,
    OperationError,
    PromptError,
    WireError,
    apply,
    cond,
    fold,
)
from tests.conftest import hooked_hidden
from tests.fidelity.test_writing import IDS, OTHER, logits


def test_values_flow_from_one_block_to_the_next(gpt2: LanguageModel) -> None:
    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0]
            scaled = donor * 2
        shifted = scaled + 1  # between the blocks
        with gpt2.trace(OTHER):
            own = gpt2.transformer.h[1].output[0]
            gpt2.transformer.h[1].output = own * 0.5 + shifted
            mixed = (donor - own).save()
            result = gpt2.lm_head.output.save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    other = hooked_hidden(gpt2.module, "transformer.h.1", OTHER)
    expected = logits(gpt2, {"transformer.h.1": lambda h: h * 0.5 + (hidden * 2 + 1)}, OTHER)
    assert torch.equal(result, expected) and torch.equal(mixed, hidden - other)


def test_values_of_an_earlier_block_are_written_into_a_site_of_a_later_one(
    gpt2: LanguageModel,
) -> None:
    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0]
        with gpt2.trace(OTHER):
            gpt2.transformer.h[1].output[0][:, -1] = donor[:, 2]
            gpt2.transformer.h[2].output[0][:, 0].add_(donor[:, 1], alpha=2)
            result = gpt2.lm_head.output.save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)

    def last(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, -1] = hidden[:, 2]
        return value

    def first(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 0] += 2 * hidden[:, 1]
        return value

    edits = {"transformer.h.1": last, "transformer.h.2": first}
    assert torch.equal(result, logits(gpt2, edits, OTHER))


def in_last_place(given: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a hook does that puts a vector at the last position."""

    def put(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, -1] = given
        return value

    return put


def logits_in_autograd(
    model: LanguageModel, given: torch.Tensor, layer: int = 0, ids: torch.Tensor = OTHER
) -> torch.Tensor:
    """The logits with a vector put in the last place of what a block returns, for autograd."""
    block: Any = model.module.get_submodule(f"transformer.h.{layer}")

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return in_last_place(given)(output[0]), *output[1:]
        return in_last_place(given)(output)

    handle = block.register_forward_hook(hook)
    found = model.module(ids, use_cache=False).logits
    handle.remove()
    return found


def test_gradients_reach_lines_that_use_values_of_an_earlier_block_alone(
    gpt2: LanguageModel,
) -> None:
    vector, scale = (torch.full([16], size, requires_grad=True) for size in (0.5, 2.0))
    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0][:, -1]
        with gpt2.trace(OTHER):
            made = donor * scale + vector
            gpt2.transformer.h[0].output[0][:, -1] = made
            loss = gpt2.lm_head.output[0, -1, 3].save()
            loss.backward()
            wanted = made.grad.save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)[:, -1]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (vector, scale)]
    put = hidden * leaves[1] + leaves[0]
    expected = logits_in_autograd(gpt2, put)[0, -1, 3]
    grads = torch.autograd.grad(expected, [*leaves, put])
    torch.testing.assert_close(loss.value, expected.detach())
    for found, right in zip((vector.grad, scale.grad, wanted.value), grads, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.no_wire  # a module of the test's own
def test_a_module_of_ones_own_is_trained_on_values_of_an_earlier_block(
    gpt2: LanguageModel,
) -> None:
    probe = torch.nn.Linear(16, 16)
    with gpt2.session():
        with gpt2.trace(IDS):
            given = gpt2.transformer.h[0].output[0][:, -1]
        with gpt2.trace(OTHER):
            difference = probe(given) - gpt2.transformer.h[1].output[0][:, -1]
            (difference**2).mean().backward()
    hidden = hooked_hidden(gpt2.module, "transformer.h.0", IDS)[:, -1]
    target = hooked_hidden(gpt2.module, "transformer.h.1", OTHER)[:, -1]
    loss = ((probe(hidden) - target) ** 2).mean()
    for own, right in zip(
        probe.parameters(), torch.autograd.grad(loss, [*probe.parameters()]), strict=True
    ):
        torch.testing.assert_close(own.grad, right)


def test_functions_of_a_later_block_use_values_of_an_earlier_one(gpt2: LanguageModel) -> None:
    weight = torch.ones(16, requires_grad=True)
    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0][0, -1]
        with gpt2.trace(OTHER):
            chosen = cond(donor.sum() > -1e9, lambda: donor * weight, lambda: donor)
            folded = fold(lambda total, x: total + x * donor, chosen, torch.tensor([1.0, 2.0]))
            gpt2.transformer.h[0].output[0][:, -1] = folded
            gpt2.lm_head.output[0, -1, 3].backward()
            folded = folded.save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)[0, -1]
    leaf = torch.ones(16, requires_grad=True)
    put = hidden * leaf + 3 * hidden
    torch.testing.assert_close(folded.value, put.detach())
    (right,) = torch.autograd.grad(logits_in_autograd(gpt2, put)[0, -1, 3], leaf)
    torch.testing.assert_close(weight.grad, right)


@pytest.mark.no_wire  # functions are called here
def test_lines_run_with_the_block_that_they_stand_in(gpt2: LanguageModel) -> None:
    order: list[str] = []

    def note(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda value: (order.append(name), value)[1]

    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[0].output[0]
            apply(note("first, at its end"), gpt2.lm_head.output)
        between = apply(note("between"), donor)
        with gpt2.trace(OTHER):
            apply(note("second, of the first"), donor)
            apply(note("second, of between"), between)
            apply(note("second"), gpt2.transformer.h[0].output[0])
    assert order == [
        "between",
        "first, at its end",
        "second, of the first",
        "second, of between",
        "second",
    ]


def test_several_prompts_of_a_later_block_use_a_value_made_of_an_earlier_one(
    gpt2: LanguageModel,
) -> None:
    prompts = [OTHER, torch.cat([OTHER, OTHER[:, :2]], 1)]
    vectors = [torch.full([16], size, requires_grad=True) for size in (0.1, 0.2)]
    with gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0][:, -1]
        with gpt2.trace() as tracer:
            for ids, vector in zip(prompts, vectors, strict=True):
                with tracer.invoke(ids):
                    gpt2.transformer.h[0].output[0][:, -1] = donor + vector
                    gpt2.lm_head.output[0, -1, 3].backward()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)[:, -1]
    for ids, vector in zip(prompts, vectors, strict=True):
        leaf = vector.detach().clone().requires_grad_()
        expected = logits_in_autograd(gpt2, hidden + leaf, ids=ids)[0, -1, 3]
        torch.testing.assert_close(vector.grad, torch.autograd.grad(expected, leaf)[0])


def test_a_mistake_in_such_a_line_leaves_other_prompts_alone(gpt2: LanguageModel) -> None:
    with pytest.raises(ExecutionError, match="invalid for input"), gpt2.session():
        with gpt2.trace(IDS):
            places = gpt2.transformer.h[1].output[0].abs().nonzero()
        with gpt2.trace() as tracer:
            with tracer.invoke(OTHER):
                failed = places.reshape(7, 7).save()
            with tracer.invoke(IDS):
                there = gpt2.lm_head.output.save()
                kept = (places + 1).save()
    hidden = hooked_hidden(gpt2.module, "transformer.h.1", IDS)
    assert torch.equal(there.value, logits(gpt2, {}, IDS))
    assert torch.equal(kept.value, hidden.abs().nonzero() + 1)
    with pytest.raises(NoValueError, match="ExecutionError"):
        _ = failed.value


def test_a_mistake_in_such_a_line_is_reported_there(gpt2: LanguageModel) -> None:
    with (
        pytest.raises(
            ExecutionError,
            match=r"<value of an earlier block>\.reshape\(7, 7\)` failed: RuntimeError",
        ),
        gpt2.session(),
    ):
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0].abs().nonzero()
        with gpt2.trace(OTHER):
            donor.reshape(7, 7).save()
    vector = torch.zeros(16, requires_grad=True)
    with pytest.raises(OperationError, match="value = value \\+ tensor"), gpt2.session():
        with gpt2.trace(IDS):
            donor = gpt2.transformer.h[1].output[0][:, -1]
        with gpt2.trace(OTHER):
            donor += vector


@pytest.mark.no_wire  # it counts runs
def test_nothing_runs_before_the_session_ends(gpt2: LanguageModel) -> None:
    runs: list[int] = []
    handle = gpt2.module.register_forward_pre_hook(lambda *_: runs.append(1))
    with gpt2.session():
        with gpt2.trace(IDS):
            first = gpt2.lm_head.output.save()
        with gpt2.generate(max_new_tokens=2, eos_token_id=None) as generator:
            with generator.invoke(OTHER):
                second = gpt2.lm_head.output.save()
        assert not runs
        with pytest.raises(NoValueError, match="no value yet"):
            print(first.value)
    handle.remove()
    assert len(runs) == 3 and generator.output.shape == (1, 8)
    assert torch.equal(first, logits(gpt2, {}, IDS)) and second.value.shape[0] == 1


def test_what_a_block_carries_is_the_value_at_the_line_that_uses_it(gpt2: LanguageModel) -> None:
    with gpt2.session():
        with gpt2.trace(IDS):
            hidden = gpt2.transformer.h[1].output[0]
            total = hidden.clone()
            before = total * 1
            total[:, 0] = 0
        with gpt2.trace(OTHER):
            difference = (before - total).abs().sum((0, 2)).save()
            assert (before - total).shape == (1, 6, 16)
            gpt2.lm_head.output.save()
    expected = hooked_hidden(gpt2.module, "transformer.h.1", IDS)[:, :1].abs().sum()
    assert torch.allclose(difference.value[0], expected) and not difference.value[1:].any()


def test_an_error_in_a_session_runs_nothing_more_and_says_so(gpt2: LanguageModel) -> None:
    with pytest.raises(ZeroDivisionError), gpt2.session():
        with gpt2.trace(IDS):
            first = gpt2.lm_head.output.save()
        1 / 0  # noqa: B018
    with pytest.raises(NoValueError, match="ZeroDivisionError"):
        print(first.value)
    with pytest.raises(PromptError), gpt2.session():
        with gpt2.trace(IDS):
            good = gpt2.lm_head.output.save()
        with gpt2.trace(torch.tensor([[100_000]])):
            bad = gpt2.lm_head.output.save()
        with gpt2.trace(OTHER):
            after = gpt2.lm_head.output.save()
    assert good.value.shape == (1, 6, 100)  # it ran before
    for value in (bad, after):
        with pytest.raises(NoValueError):
            print(value.value.shape)
    with gpt2.trace(IDS):
        later = gpt2.lm_head.output.save()
    assert torch.equal(later, logits(gpt2, {}, IDS))


def test_a_session_is_entered_once_and_belongs_to_its_model(gpt2: LanguageModel) -> None:
    session = gpt2.session()
    with session, pytest.raises(BlockError), session:
        pass
    with pytest.raises(BlockError), session:
        pass
    other = LanguageModel(gpt2.module)
    with gpt2.session(), other.trace(IDS):
        result = other.lm_head.output.save()
    assert torch.equal(result, logits(gpt2, {}, IDS))


def test_an_edited_model_holds_what_was_recorded_in_every_run(gpt2: LanguageModel) -> None:
    with gpt2.edit() as edited:
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 0.5
        edited.transformer.h[2].mlp.output[:, 0] = 0  # either name will do

    def halve(h: torch.Tensor) -> torch.Tensor:
        return h * 0.5

    def zero(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, 0] = 0
        return h

    edits = {"transformer.h.1": halve, "transformer.h.2.mlp": zero}
    for ids in (IDS, OTHER):
        with edited.trace(ids):
            result = edited.lm_head.output.save()
            hidden = edited.transformer.h[1].output[0].save()
        assert torch.equal(result, logits(gpt2, edits, ids))
        assert torch.equal(hidden, hooked_hidden(gpt2.module, "transformer.h.1", ids) * 0.5)
    with gpt2.trace(IDS):
        plain = gpt2.lm_head.output.save()
    assert torch.equal(plain, logits(gpt2, {}, IDS))
    with edited.trace() as tracer:
        values = []
        for ids in (IDS, OTHER):
            with tracer.invoke(ids):
                values.append(edited.lm_head.output.save())
    for value, ids in zip(values, (IDS, OTHER), strict=True):
        assert torch.allclose(value.value, logits(gpt2, edits, ids), atol=1e-5)


def test_edits_stack_and_print(gpt2: LanguageModel) -> None:
    with gpt2.edit() as once:
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] + 1
    with once.edit() as again:
        once.transformer.h[1].output = once.transformer.h[1].output[0] * 2
        once.transformer.h[3].skip(once.transformer.h[2].output)
    with again.trace(IDS):
        again.transformer.h[1].output[0][:, -1] = 0
        result = again.lm_head.output.save()

    def changed(h: torch.Tensor) -> torch.Tensor:
        h = (h + 1) * 2
        h[:, -1] = 0
        return h

    kept: list[torch.Tensor] = []
    edits = {
        "transformer.h.1": changed,
        "transformer.h.2": lambda h: kept.append(h) or h,
        "transformer.h.3": lambda h: kept[0],
    }
    assert torch.equal(result, logits(gpt2, edits, IDS))
    assert "edit: transformer.h[1].output = (transformer.h[1].output[0] + 1)" in repr(once)
    assert "edit: transformer.h[3].skip(transformer.h[2].output)" in repr(again)
    assert "edit" not in repr(gpt2)


def test_an_edit_holds_in_every_step_of_a_generation(gpt2: LanguageModel) -> None:
    torch.manual_seed(3)
    vector = torch.randn(16) * 3
    with gpt2.edit() as edited:
        gpt2.transformer.h[1].output[0] += vector
    with edited.generate(IDS, max_new_tokens=4, eos_token_id=None) as generator:
        after = edited.transformer.h[1].output[0].save()
        with generator.step(2):
            last = edited.transformer.h[1].output[0].save()
    kept: list[torch.Tensor] = []

    def hook(module: object, args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden += vector
        kept.append(hidden.clone())

    handle = gpt2.module.transformer.h[1].register_forward_hook(hook)
    expected = gpt2.module.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    handle.remove()
    assert torch.equal(generator.output, expected)
    assert torch.equal(after, kept[0]) and torch.equal(last, kept[2])


def test_a_step_can_be_changed_after_the_edit(gpt2: LanguageModel) -> None:
    with gpt2.edit() as edited:
        gpt2.transformer.h[1].output = gpt2.transformer.h[1].output[0] * 2
    with edited.generate(IDS, max_new_tokens=3, eos_token_id=None) as generator, generator.step(1):
        edited.transformer.h[1].output = edited.transformer.h[1].output[0] + 5
    step = [0]

    def hook(module: object, args: object, output: object) -> object:
        hidden = (output[0] if isinstance(output, tuple) else output) * 2
        hidden = hidden + 5 if step[0] == 1 else hidden
        step[0] += 1
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = gpt2.module.transformer.h[1].register_forward_hook(hook)
    expected = gpt2.module.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=3,
        eos_token_id=None,
        pad_token_id=0,
    )
    handle.remove()
    assert torch.equal(generator.output, expected)


def test_edits_are_saved_to_a_file_and_loaded_from_it(gpt2: LanguageModel, tmp_path: Path) -> None:
    vector = torch.linspace(-1, 1, 16)
    with gpt2.edit() as once:
        gpt2.transformer.h[1].output[0][:, 1:] += vector
    with once.edit() as twice:
        twice.transformer.h[2].output = twice.transformer.h[2].output[0] * 2
    twice.save_edits(tmp_path / "edits")
    loaded = LanguageModel(gpt2.module).load_edits(tmp_path / "edits")
    with loaded.trace(IDS):
        result = loaded.lm_head.output.save()

    def add(h: torch.Tensor) -> torch.Tensor:
        h[:, 1:] += vector
        return h

    edits = {"transformer.h.1": add, "transformer.h.2": lambda h: h * 2}
    assert torch.equal(result, logits(gpt2, edits, IDS))
    (tmp_path / "edits").write_bytes(b"something else")
    with pytest.raises(WireError):
        gpt2.load_edits(tmp_path / "edits")
    with gpt2.edit() as trained:
        gpt2.transformer.h[1].output[0] += torch.zeros(16, requires_grad=True)
    with pytest.raises(WireError, match="requires grad"):
        trained.save_edits(tmp_path / "edits")


def test_an_edit_of_a_model_that_is_not_loaded_shares_its_weights(eiffel: LanguageModel) -> None:
    with eiffel.edit() as edited:
        eiffel.transformer.h[0].output = eiffel.transformer.h[0].output[0] * 2
    assert not eiffel.loaded and not edited.loaded
    with edited.trace("The Eiffel Tower"):
        result = edited.lm_head.output.save()
    assert eiffel.loaded and edited.load() is eiffel.load()
    ids = eiffel.tokenizer("The Eiffel Tower", return_tensors="pt").input_ids
    assert torch.equal(result, logits(eiffel, {"transformer.h.0": lambda h: h * 2}, ids))


def test_what_has_no_place_in_an_edit_is_refused(gpt2: LanguageModel) -> None:
    with pytest.raises(OperationError, match="no place in an edit") as caught:
        with gpt2.edit():
            gpt2.transformer.h[0].output[0].save()  # the line to find
    assert "the line to find" in str(caught.value)


def test_a_scan_checks_and_gives_shapes_without_loading(eiffel: LanguageModel) -> None:
    with eiffel.scan("The Eiffel Tower is in"):
        hidden = eiffel.transformer.h[-1].output[0]
        gram = (hidden @ hidden.mT).save()
        eiffel.transformer.h[0].output[0][:, -1] = 0
        result = eiffel.lm_head.output.save()
    count = len(eiffel.tokenizer("The Eiffel Tower is in").input_ids)
    assert gram.shape == (1, count, count)
    assert result.value.shape == (1, count, eiffel.config.vocab_size)
    assert not eiffel.loaded


def test_a_scan_finds_mistakes_at_their_line(eiffel: LanguageModel) -> None:
    with pytest.raises(ValueError, match="mat1|shape|size") as caught:
        with eiffel.scan("The Eiffel Tower is in"):
            eiffel.transformer.h[-1].output[0] @ torch.zeros(3, 3)  # the line to find
    assert "the line to find" in str(caught.value)
    with pytest.raises(RuntimeError, match="later in the run"), eiffel.scan("The Eiffel Tower"):
        eiffel.transformer.h[0].output = eiffel.transformer.h[1].output[0]
    with pytest.raises(ValueError, match="the shape there is"), eiffel.scan("The Eiffel Tower"):
        eiffel.transformer.h[0].output = torch.zeros(1, 1, 1)
    assert not eiffel.loaded
