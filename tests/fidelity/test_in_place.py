"""Writes in place, against the same lines in plain PyTorch hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import nn

from insitu import CausalityError, ExecutionError, LanguageModel, Model, OperationError
from tests.fidelity.test_writing import IDS, OTHER, SHORT, block_paths, blocks, logits
from tests.thinning import sampled

ROW = torch.linspace(-1, 1, 16)


def zero(h: Any) -> None:
    h[:, -1] = 0


def add(h: Any) -> None:
    h += 0.5


def scale_a_slice(h: Any) -> None:
    h[:, 1:3] *= 3


def method(h: Any) -> None:
    h[:, 2].zero_()


def copy(h: Any) -> None:
    h[0, 1].copy_(ROW)


def fancy(h: Any) -> None:
    h[:, [0, 3]] = ROW


def masked(h: Any) -> None:
    h[h > 0] = 0


def masked_augmented(h: Any) -> None:
    h[h > 0] *= 2


def view_of_view(h: Any) -> None:
    h.view(h.shape[0], h.shape[1], 4, 4)[:, :, 2][..., 1:] = 7


def heads(h: Any) -> None:
    rearrange(h, "b t (n d) -> b n t d", n=4)[:, 1] = 0


def index_copy(h: Any) -> None:
    h.index_copy_(1, torch.tensor([1, 4]), torch.ones(1, 2, 16))


def from_itself(h: Any) -> None:
    h[:, 0] = h[:, 1] + h[:, 2]
    h[:, 1] = h[:, 0] * 2


def transposed(h: Any) -> None:
    h.mT[..., 3] -= 1


def in_parts(h: Any) -> None:
    first, second = h.chunk(2, -1)
    first.mul_(2)
    second.clamp_(min=0)


def scattered(h: Any) -> None:
    h.scatter_(2, torch.zeros(1, 6, 1, dtype=torch.int64), 5.0)


EDITS = [
    *(zero, add, scale_a_slice, method, copy, fancy, masked, masked_augmented, view_of_view),
    *(heads, index_copy, from_itself, transposed, in_parts, scattered),
]


def in_hook(edit: Callable[[Any], None]) -> Callable[[Any], Any]:
    def edited(hidden: torch.Tensor) -> torch.Tensor:
        edit(hidden)
        return hidden

    return edited


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_write_in_place_reaches_the_model(
    language_model: LanguageModel, edit: Callable[[Any], None]
) -> None:
    model, path = language_model, block_paths(language_model)[1]
    with model.trace(IDS):
        edit(blocks(model)[1].output[0])
        after = blocks(model)[1].output[0].save()
        result = model.lm_head.output.save()
    kept: list[torch.Tensor] = []

    def hook(hidden: torch.Tensor) -> torch.Tensor:
        edit(hidden)
        kept.append(hidden.clone())
        return hidden

    assert torch.equal(result, logits(model, {path: hook}, IDS))
    assert torch.equal(after, kept[0])
    assert not torch.equal(result, logits(model, {}, IDS))


@pytest.mark.parametrize(
    "edit",
    sampled(EDITS, [zero, method, masked, view_of_view, transposed]),
    ids=lambda edit: edit.__name__,
)
def test_a_write_in_place_stays_in_its_invocation(
    gpt2: LanguageModel, edit: Callable[[Any], None]
) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(SHORT):
            before = gpt2.lm_head.output.save()
        with tracer.invoke(IDS):
            edit(gpt2.transformer.h[2].output[0])
            edited = gpt2.lm_head.output.save()
        with tracer.invoke(OTHER):
            after = gpt2.lm_head.output.save()
    path = "transformer.h.2"
    assert torch.allclose(edited.value, logits(gpt2, {path: in_hook(edit)}, IDS), atol=1e-5)
    assert torch.allclose(before.value, logits(gpt2, {}, SHORT), atol=1e-5)
    assert torch.allclose(after.value, logits(gpt2, {}, OTHER), atol=1e-5)


def test_what_stands_before_a_write_sees_what_was_there(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        later = gpt2.transformer.h[3].output[0]
        before = hidden.save()
        mixed = (hidden * 2 + later).save()  # computed after the write
        hidden[:, 2] = 0
        after = hidden.save()
        result = gpt2.lm_head.output.save()
    kept: dict[str, torch.Tensor] = {}

    def edit(value: torch.Tensor) -> torch.Tensor:
        kept["before"] = value.clone()
        value[:, 2] = 0
        kept["after"] = value.clone()
        return value

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept["later"] = value.clone()
        return value

    expected = logits(gpt2, {"transformer.h.1": edit, "transformer.h.3": keep}, IDS)
    assert torch.equal(before, kept["before"]) and torch.equal(after, kept["after"])
    assert torch.equal(mixed, kept["before"] * 2 + kept["later"])
    assert torch.equal(result, expected)


def test_a_view_taken_before_sees_the_write(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        view = hidden[:, 2:4]
        copied = hidden.clone()
        hidden.zero_()
        seen, own = view.save(), copied.save()
    assert torch.equal(seen, torch.zeros(1, 2, 16)) and own.value.abs().sum() > 0


def test_what_another_site_shares_memory_with_is_not_written(gpt2: LanguageModel) -> None:
    """Dropout outside of training returns what it is given."""
    with gpt2.trace(IDS):
        dropped = gpt2.transformer.h[0].mlp.dropout.output
        projected = gpt2.transformer.h[0].mlp.c_proj.output
        before = projected.save()
        dropped[:, 1] = 0
        after = projected.save()
        written = dropped.save()
        result = gpt2.lm_head.output.save()
    assert torch.equal(before, after) and before[:, 1].abs().sum() > 0
    assert written[:, 1].abs().sum() == 0

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 1] = 0
        return value

    assert torch.equal(result, logits(gpt2, {"transformer.h.0.mlp.dropout": edit}, IDS))


def test_a_write_that_waits_for_something_later_is_a_causality_error(gpt2: LanguageModel) -> None:
    with pytest.raises(CausalityError, match=r"h\[1\].output.*h\[2\].output") as caught:
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].output[0][:, 0] = gpt2.transformer.h[2].output[0][:, 0]  # here
    assert "here" in str(caught.value)
    with gpt2.trace(IDS):
        clean = gpt2.lm_head.output.save()
    assert torch.equal(clean, logits(gpt2, {}, IDS))


def test_memory_of_ones_own_can_be_written_at_any_time(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        total = torch.zeros_like(gpt2.transformer.h[0].output[0])
        for block in gpt2.transformer.h:
            total += block.output[0]
        total[:, 0] = -1
        summed = total.save()
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.clone())
        return value

    logits(gpt2, dict.fromkeys(block_paths(gpt2), keep), IDS)
    expected = torch.zeros(1, 6, 16)
    for value in kept:
        expected += value
    expected[:, 0] = -1
    assert torch.equal(summed, expected)


def test_what_was_assigned_to_a_site_can_be_written_in_place(gpt2: LanguageModel) -> None:
    constant = torch.ones(1, 6, 16)
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output = constant
        gpt2.transformer.h[1].output[0][:, 3] = 0
        result = gpt2.lm_head.output.save()
    assert torch.equal(constant, torch.ones(1, 6, 16))

    def edit(value: torch.Tensor) -> torch.Tensor:
        value = torch.ones_like(value)
        value[:, 3] = 0
        return value

    assert torch.equal(result, logits(gpt2, {"transformer.h.1": edit}, IDS))


def test_augmented_assignment_to_a_site_and_to_its_part(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].output[0] += 1
        gpt2.transformer.h[2].mlp.output *= 2
        gpt2.transformer.h[3].output[0][:, -1] -= 3
        result = gpt2.lm_head.output.save()

    def last(value: torch.Tensor) -> torch.Tensor:
        value[:, -1] -= 3
        return value

    edits = {
        "transformer.h.1": lambda value: value.add_(1),
        "transformer.h.2.mlp": lambda value: value.mul_(2),
        "transformer.h.3": last,
    }
    assert torch.equal(result, logits(gpt2, edits, IDS))


def test_augmented_assignment_to_a_part_of_a_tensor_records_one_write(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS) as tracer:
        for _ in range(3):
            gpt2.transformer.h[3].output[0][:, -1] += 1
    names = [row[0].name for row in tracer.graph.rows]
    assert names.count("put") == 3
    # The read, and once for each line the hidden states and what is written into.
    assert len(names) == 1 + 3 * (2 + 1), names


@pytest.mark.parametrize("spelling", ["part", "augmented", "method", "assigned", "inputs"])
def test_a_write_to_an_input_is_one_write_however_it_is_spelled(
    gpt2: LanguageModel, spelling: str
) -> None:
    """The residual stream goes around a norm, and what the norm is given alone is written."""
    with gpt2.trace(IDS):
        norm = gpt2.transformer.h[1].ln_1
        if spelling == "part":
            norm.input[:, 0] = 0
        elif spelling == "augmented":
            norm.input[:, 0] *= 0
        elif spelling == "method":
            norm.input[:, 0].zero_()
        elif spelling == "assigned":
            new = norm.input.clone()
            new[:, 0] = 0
            norm.input = new
        else:
            norm.inputs[0][0][:, 0] = 0
        result = gpt2.lm_head.output.save()

    def hook(module: nn.Module, args: Any) -> Any:
        given = args[0].clone()
        given[:, 0] = 0
        return (given,)

    handle = gpt2.module.transformer.h[1].ln_1.register_forward_pre_hook(hook)
    expected = logits(gpt2, {}, IDS)
    handle.remove()
    assert torch.equal(result, expected)


def test_what_another_invocation_writes_into_is_for_its_lines_only(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            donor = gpt2.transformer.h[1].output[0]
            clean = gpt2.lm_head.output.save()
        with tracer.invoke(OTHER):
            donor[:, 2] = 0
            seen = donor.save()
            gpt2.transformer.h[2].output[0][:, 2] = donor[:, 1]
    assert torch.equal(clean, logits(gpt2, {}, IDS)) and seen[:, 2].abs().sum() == 0
    with pytest.raises(OperationError, match="Another invocation has written"):
        with gpt2.trace() as tracer:
            with tracer.invoke(IDS) as first:
                donor = gpt2.transformer.h[1].output[0]
            with tracer.invoke(OTHER):
                donor[:, 2] = 0
            with first:
                donor[:, 1] = 0


def test_entries_of_a_tuple_stay_what_they_are_beside_one_that_is_assigned() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x * 2

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.two(x)
            return left - 3 * right

    model, x = Model(Sum()), torch.randn(2, 3)
    with model.trace(x):
        left, right = model.two.output[0], model.two.output[1]
        model.two.output[0] = left * 5
        right[:, 0] = 7  # from before, and what stands there still
        left[:, 1] = 9  # of what stands there no more
        now = model.two.output[1].save()
        kept = left.save()
        result = model.output.save()
    first, second = x + 1, x * 2
    second[:, 0] = 7
    assert torch.equal(result, first * 5 - 3 * second) and torch.equal(now, second)
    first[:, 1] = 9
    assert torch.equal(kept, first)


def test_each_entry_of_a_tuple_is_copied_before_it_is_written() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.pair(x)
            return left + 3 * right + 9 * x

    model, x = Model(Around()), torch.randn(2, 3)
    before = x.clone()
    with model.trace(x):
        for entry in (0, 1, 0):
            model.pair.output[entry][:, 0] = entry
        result = model.output.save()
    left, right = before + 1, before.clone()
    left[:, 0], right[:, 0] = 0, 1
    assert torch.equal(x, before)
    assert torch.equal(result, left + 3 * right + 9 * x)


def test_values_of_the_run_may_be_arguments_by_keyword(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        first = gpt2.transformer.h[0].output[0]
        second = gpt2.transformer.h[1].output[0]
        second[:, 1:].add_(other=first[:, 1:], alpha=2)
        result = gpt2.lm_head.output.save()
    kept: list[torch.Tensor] = []

    def add(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, 1:] += 2 * kept[0][:, 1:]
        return value

    edits = {"transformer.h.0": lambda h: kept.append(h.clone()) or h, "transformer.h.1": add}
    torch.testing.assert_close(result.value, logits(gpt2, edits, IDS))


def test_what_was_assigned_keeps_what_its_source_was(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        own = gpt2.transformer.h[1].output[0] * 2
        own[:, 0] = 1
        gpt2.transformer.h[1].output[0] = own
        own[:, 1] = 3  # after the assignment, and so for the lines alone
        kept = own.save()
        result = gpt2.lm_head.output.save()
    given: list[torch.Tensor] = []

    def doubled(value: torch.Tensor) -> torch.Tensor:
        value = value * 2
        value[:, 0] = 1
        given.append(value.clone())
        return value

    assert torch.equal(result, logits(gpt2, {"transformer.h.1": doubled}, IDS))
    given[0][:, 1] = 3
    assert torch.equal(kept, given[0])


def test_a_late_write_to_what_is_then_replaced_is_not_waited_for(gpt2: LanguageModel) -> None:
    with gpt2.trace(IDS):
        hidden = gpt2.transformer.h[1].output[0]
        hidden[:, 0] = gpt2.transformer.h[3].output[0][:, 0]
        gpt2.transformer.h[1].output[0] = torch.ones(1, 6, 16)
        result = gpt2.lm_head.output.save()
    assert torch.equal(result, logits(gpt2, {"transformer.h.1": torch.ones_like}, IDS))


def test_an_index_by_number_means_the_part_of_a_tuple_or_the_row_of_a_tensor(
    gpt2: LanguageModel,
) -> None:
    with gpt2.trace(IDS):
        gpt2.transformer.h[1].attn.output[0] = torch.zeros(1, 6, 16)
        gpt2.transformer.h[1].mlp.output[0] = 0
        result = gpt2.lm_head.output.save()
    edits = {"transformer.h.1.attn": torch.zeros_like, "transformer.h.1.mlp": torch.zeros_like}
    assert torch.equal(result, logits(gpt2, edits, IDS))


def test_what_the_user_gave_to_the_run_is_not_written() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Identity()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(x) + self.scale(self.weight)

    model, x = Model(Residual()), torch.ones(2, 3)
    with model.trace(x):
        model.scale.input.zero_()
        result = model.output.save()
    assert torch.equal(x, torch.ones(2, 3)) and torch.equal(result, torch.ones(2, 3))
    with model.trace(x):
        model.scale.call(1).output.zero_()
        model.output.save()
    assert torch.equal(model.module.weight, torch.ones(3))


def test_writes_of_one_invocation_with_values_of_another(gpt2: LanguageModel) -> None:
    with gpt2.trace() as tracer:
        with tracer.invoke(IDS):
            donor = gpt2.transformer.h[1].output[0]
        with tracer.invoke(OTHER):
            gpt2.transformer.h[1].output[0][:, 2] = donor[:, 2]
            result = gpt2.lm_head.output.save()
    kept: list[torch.Tensor] = []
    path = "transformer.h.1"
    logits(gpt2, {path: lambda value: kept.append(value.clone()) or value}, IDS)

    def edit(value: torch.Tensor) -> torch.Tensor:
        value[:, 2] = kept[0][:, 2]
        return value

    assert torch.allclose(result.value, logits(gpt2, {path: edit}, OTHER), atol=1e-5)


def test_a_write_in_place_in_every_step(gpt2: LanguageModel) -> None:
    with gpt2.generate(IDS, max_new_tokens=4, eos_token_id=None) as generator:
        with generator.every_step():
            gpt2.transformer.h[1].output[0][:, -1] *= -4
            after = gpt2.transformer.h[1].output[0][:, -1].save()
    block, kept = gpt2.module.transformer.h[1], []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] *= -4
        kept.append(hidden[:, -1].clone())

    handle = block.register_forward_hook(hook)
    options = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    expected = gpt2.module.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    handle.remove()
    assert torch.equal(generator.output, expected)
    assert all(torch.equal(a, b) for a, b in zip(after.value, kept, strict=True))


def test_in_an_edit_the_run_says_whether_a_part_is_a_view(gpt2: LanguageModel) -> None:
    """An edit is written before there is a prompt, so it has no shapes."""
    site = gpt2.transformer.h[1].attn.c_proj
    with gpt2.edit() as edited:
        site.input.reshape(1, 6, 4, 4)[:, :, 2].mul_(0.5)
    with edited.trace(IDS):
        result = edited.lm_head.output.save()

    def hook(module: nn.Module, args: Any) -> Any:
        given = args[0].clone()
        given.reshape(1, 6, 4, 4)[:, :, 2].mul_(0.5)
        return (given,)

    handle = gpt2.module.transformer.h[1].attn.c_proj.register_forward_pre_hook(hook)
    assert torch.equal(result, logits(gpt2, {}, IDS))
    handle.remove()
    with gpt2.edit() as edited:
        site.input.mT.reshape(1, -1)[:, 0] = 0  # of a copy
    with pytest.raises(OperationError, match="the write would be lost") as caught:
        with edited.trace(IDS):
            edited.lm_head.output.save()
    assert "of a copy" in str(caught.value)
    with pytest.raises(OperationError, match="is not known before the run"), gpt2.edit():
        flat = site.input.mT.reshape(1, -1)
        site.input[:, 0] = 0
        gpt2.transformer.h[1].mlp.output = flat


def test_mistakes_in_place_are_reported_at_their_line(gpt2: LanguageModel) -> None:
    with pytest.raises(OperationError, match=r"`.*\[0\]` for its first element"):
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].output[:, -1] = 0
    with pytest.raises((ExecutionError, RuntimeError), match="setitem|shape") as caught:
        with gpt2.trace(IDS):
            gpt2.transformer.h[1].output[0][:, -1] = torch.zeros(7)  # does not fit
    assert "does not fit" in str(caught.value)
