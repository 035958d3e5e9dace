"""Blocks that are like one before find its plan, and only those do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import insitu
from insitu import LanguageModel, Model
from insitu.tracing import planning


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows by one for each plan that is made."""
    made: list[int] = []

    def counting(*args: Any) -> Any:
        made.append(1)
        return make_plan(*args)

    make_plan = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", counting)
    yield made


@pytest.fixture
def identity() -> Model:
    """Passes on what it is given, so that what lines do is a closed form of the input."""
    return Model(nn.Sequential(nn.Identity(), nn.Identity()))


def repeated(block: Callable[[Any], Any], arguments: list[Any]) -> list[Any]:
    """Runs the same lines several times: first to let Python settle on its instructions."""
    for argument in (*arguments[:1] * 3, *arguments[1:]):
        block(argument)
    return [block(argument) for argument in arguments]


def test_a_loop_is_planned_once(gpt2: LanguageModel, planned: list[int]) -> None:
    def block(seed: int) -> torch.Tensor:
        ids = torch.randint(100, (1, 5), generator=torch.Generator().manual_seed(seed))
        steering = torch.full((16,), float(seed))
        with gpt2.trace(ids):
            gpt2.transformer.h[1].output[0][:, -1] += steering
            kept = gpt2.lm_head.output.save()
        hidden = []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            changed = (output[0] if isinstance(output, tuple) else output).clone()
            changed[:, -1] += steering
            hidden.append(changed)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = gpt2.transformer.h[1].module.register_forward_hook(hook)
        with torch.no_grad():
            expected = gpt2.module(ids, use_cache=False).logits
        handle.remove()
        torch.testing.assert_close(kept.value, expected, rtol=0, atol=0)
        return kept.value

    repeated(block, list(range(5)))
    count = len(planned)
    for seed in range(5, 15):
        block(seed)
    assert len(planned) == count


def test_blocks_in_turn_are_planned_once_each(identity: Model, planned: list[int]) -> None:
    def block(number: float) -> None:
        given = torch.full((2, 3), number)
        with identity.trace(given):
            added = (identity[0].output + 1).save()
        with identity.trace(given):
            multiplied = (identity[0].output * 2).save()
            identity[1].output = identity[0].output - given
            after = identity[1].output.save()
        torch.testing.assert_close(added.value, given + 1, rtol=0, atol=0)
        torch.testing.assert_close(multiplied.value, given * 2, rtol=0, atol=0)
        torch.testing.assert_close(after.value, given * 0, rtol=0, atol=0)

    repeated(block, [1.0, 2.0])
    count = len(planned)
    repeated(block, [3.0, 4.0])
    assert len(planned) == count


def test_invocations_are_planned_once(gpt2: LanguageModel, planned: list[int]) -> None:
    def block(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(100, (1, n), generator=generator) for n in (3, 7, 7, 4)]
        kept = []
        with gpt2.trace() as tracer:
            for prompt in (*prompts, prompts[1]):
                with tracer.invoke(prompt):
                    kept.append(gpt2.lm_head.output.save())
        for prompt, proxy in zip((*prompts, prompts[1]), kept, strict=True):
            with torch.no_grad():
                expected = gpt2.module(prompt, use_cache=False).logits
            torch.testing.assert_close(proxy.value, expected, rtol=1e-5, atol=1e-5)
        return kept[0].value

    repeated(block, list(range(3)))
    count = len(planned)
    for seed in range(3, 8):
        block(seed)
    assert len(planned) == count


@pytest.mark.thorough
def test_generations_are_planned_once_for_each_form(
    gpt2: LanguageModel, planned: list[int]
) -> None:
    def block(seed: int, length: int, tokens: int, **options: Any) -> tuple[Any, ...]:
        ids = torch.randint(1, 100, (1, length), generator=torch.Generator().manual_seed(seed))
        with gpt2.generate(ids, max_new_tokens=tokens, **options) as generator:
            with generator.step[1]:
                gpt2.transformer.h[0].output[0][:] *= 2.0
            with generator.every_step():
                logits = gpt2.lm_head.output[:, -1].save()
        return ids, generator.output, logits

    def plain(
        ids: torch.Tensor, tokens: int, **options: Any
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        kept: list[torch.Tensor] = []
        part = gpt2.module.transformer.h[0]

        def steer(module: nn.Module, args: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if len(kept) == 1:
                hidden.mul_(2.0)

        def keep(module: nn.Module, args: object, output: torch.Tensor) -> None:
            kept.append(output[:, -1].clone())

        with part.register_forward_hook(steer), gpt2.module.lm_head.register_forward_hook(keep):
            found = gpt2.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                pad_token_id=0,
                **options,
            )
        return found, kept

    forms = [
        {"length": 5, "tokens": 4},
        {"length": 6, "tokens": 4},
        {"length": 5, "tokens": 3},
        {"length": 5, "tokens": 4, "use_cache": False},
        {"length": 5, "tokens": 4, "min_new_tokens": 4},
    ]
    counts: list[int] = []
    for seed in range(5):
        for form in forms:
            ids, output, logits = block(seed, **form)
            options = {name: value for name, value in form.items() if name != "length"}
            expected, kept = plain(ids, **options)
            assert torch.equal(output, expected)
            for one, other in zip(logits, kept, strict=True):
                torch.testing.assert_close(one, other)
        counts.append(len(planned))
    assert counts[-1] == counts[-2]  # the first rounds let Python settle on its instructions


def test_prompts_that_are_equal_now_and_not_later(gpt2: LanguageModel) -> None:
    """What invocations share is found anew where other prompts are equal."""
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 7, 8]])

    def block(prompts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        kept = []
        with gpt2.trace(share_prefixes=True) as tracer:
            for number, prompt in enumerate(prompts):
                with tracer.invoke(prompt):
                    gpt2.transformer.h[2].output[0][:, number] = 0.0
                    kept.append(gpt2.lm_head.output.save())
        return torch.cat([proxy.value for proxy in kept])

    forms = [(one, one, one), (one, other, one), (one, other, other), (other, other, other)]
    found = repeated(block, forms)
    for prompts, values in zip(forms, found, strict=True):
        for number, prompt in enumerate(prompts):

            def hook(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                (output[0] if isinstance(output, tuple) else output)[:, number] = 0.0

            handle = gpt2.transformer.h[2].module.register_forward_hook(hook)
            with torch.no_grad():
                expected = gpt2.module(prompt, use_cache=False).logits[0]
            handle.remove()
            torch.testing.assert_close(values[number], expected, rtol=1e-5, atol=1e-5)


def check_keys(identity: Model, keys: list[Any]) -> None:
    """Compares writes to what keys stand for, one block after the other, with torch."""
    given = torch.arange(4.0).view(2, 2)

    def block(key: Any) -> torch.Tensor:
        with identity.trace(given):
            part = identity[0].output[key]
            part += 1  # a view or a copy: that is up to the key
            kept = identity[1].output.save()
        return kept.value

    for key, found in zip(keys * 2, repeated(block, keys * 2), strict=True):
        expected = given.clone()
        part = expected[key]
        part += 1
        assert torch.equal(found, expected), key


@pytest.mark.parametrize(
    "keys",
    [
        [1, True, 0, False],
        [(0, 1), (False, 1), (0, True)],
        [slice(1, 2), 1, slice(True, 2)],
        [[1, 0], [True, False]],
        [torch.tensor([1, 0]), torch.tensor([True, False])],
    ],
    ids=repr,
)
def test_what_equals_a_key_and_is_another(identity: Model, keys: list[Any]) -> None:
    check_keys(identity, keys)


def test_positions_that_equal_others_and_are_not(gpt2: LanguageModel) -> None:
    """`logits[0, 1]` needs one position of the logits, and `logits[0, True]` needs all."""
    prompts = torch.randint(100, (2, 1, 8), generator=torch.Generator().manual_seed(0))

    def block(key: Any) -> list[torch.Tensor]:
        kept = []
        with gpt2.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    kept.append(gpt2.lm_head.output[key].save())
        return [proxy.value for proxy in kept]

    keys = [(0, 1), (0, True), (0, 0), (0, False), (0, 1)]
    for key, found in zip(keys, repeated(block, keys), strict=True):
        for prompt, value in zip(prompts, found, strict=True):
            with torch.no_grad():
                expected = gpt2.module(prompt, use_cache=False).logits[key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_other_lines_and_other_saves_are_planned_anew(identity: Model) -> None:
    def block(form: tuple[int, bool]) -> torch.Tensor:
        index, early = form
        with identity.trace(torch.ones(2)):
            value = identity[index].output * 2
            if early:
                value.save()
            identity[1].output = identity[1].output + value if index == 0 else value
            kept = identity.output.save()
        return kept.value

    forms = [(0, False), (0, True), (1, False), (1, True)]
    found = repeated(block, forms)
    assert [float(value[0]) for value in found] == [3.0, 3.0, 2.0, 2.0]


def test_a_constant_of_another_form(identity: Model) -> None:
    def block(constant: torch.Tensor) -> torch.Tensor:
        with identity.trace(torch.ones(2)):
            kept = (identity[0].output * constant).save()
        return kept.value

    constants = [torch.ones(1), torch.full((3, 2), 2.0), torch.full((2,), 3.0).double()]
    for constant, found in zip(constants, repeated(block, constants), strict=True):
        assert torch.equal(found, torch.ones(2) * constant)


def test_a_tensor_may_be_a_leaf_where_one_was_made_of_a_leaf_before(
    identity: Model, planned: list[int]
) -> None:
    def block(weight: torch.Tensor) -> None:
        with identity.trace(torch.full((2,), 3.0)):
            (identity[0].output * weight).sum().backward()

    leaves = [torch.ones(2, requires_grad=True) for _ in range(2)]
    for _ in range(3):
        block(leaves[0] * 1)  # no leaf itself: the gradient goes to what it was made of
    plans = len(planned)
    block(leaves[1])
    assert len(planned) == plans
    assert torch.equal(leaves[0].grad, torch.full((2,), 9.0))
    assert torch.equal(leaves[1].grad, torch.full((2,), 3.0))


def test_functions_are_called_anew(identity: Model) -> None:
    def block(factor: int) -> torch.Tensor:
        def scaled(value: torch.Tensor) -> torch.Tensor:
            return value * factor

        with identity.trace(torch.ones(2)):
            kept = insitu.apply(scaled, identity[0].output).save()
        return kept.value

    assert [float(value[0]) for value in repeated(block, [1, 2, 3])] == [1.0, 2.0, 3.0]


def test_plans_keep_no_constants_and_not_forever(identity: Model) -> None:
    constants = [torch.randn(4) for _ in range(3)]
    references = [weakref.ref(constant) for constant in constants]

    def block(constant: torch.Tensor, number: int) -> None:
        with identity.trace(torch.ones(4)):
            (identity[0].output * constant + number).save()

    for number in range(100):
        block(constants[number % 3], number)
    assert len(identity.plans) <= 64
    constants.clear()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_training_mode_is_another_plan(gpt2: LanguageModel) -> None:
    def block() -> int:
        with gpt2.trace() as tracer:
            for prompt in ([[1, 2]], [[3, 4]]):
                with tracer.invoke(prompt):
                    gpt2.lm_head.output.save()
        return len(tracer.plan.passes)

    assert [block() for _ in range(4)] == [1, 1, 1, 1]
    gpt2.module.train()
    with pytest.warns(UserWarning, match="training mode"):
        assert block() == 2
    gpt2.module.eval()
    assert block() == 1


def test_a_tensor_in_the_place_of_a_number_is_another_graph() -> None:
    model = Model(torch.nn.Sequential(torch.nn.Linear(3, 3)))
    for scale in (0.5, torch.tensor([1.0, 2.0, 3.0]), 0.25, torch.tensor([3.0, 2.0, 1.0])):
        with model.trace(torch.ones(1, 3)):
            value = (model[0].output * scale).save()
        with torch.no_grad():
            assert torch.equal(value.value, model.module(torch.ones(1, 3)) * scale)


@pytest.mark.parametrize("keys", [[1, torch.tensor(True)], [(0, 1), (0, torch.tensor(True))]])
def test_a_mask_of_one_element_is_no_position(identity: Model, keys: list[Any]) -> None:
    check_keys(identity, keys)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_leaf_of_one_element_in_the_place_of_a_number_has_its_gradient(
    identity: Model, by_name: bool
) -> None:
    def block(factor: Any) -> None:
        with identity.trace(torch.full((2,), 3.0)):
            value = identity[0].output
            value = torch.clamp(value, max=factor) if by_name else value * factor
            (value + torch.zeros(2, requires_grad=True)).sum().backward()

    leaves = [torch.tensor([2.0], requires_grad=True) for _ in range(3)]
    for leaf in leaves:
        for _ in range(3):
            block(2.0)
        block(leaf)
    assert [float(leaf.grad) for leaf in leaves] == [2.0 if by_name else 6.0] * 3


def test_numbers_that_are_made_anew_find_their_plan(identity: Model, planned: list[int]) -> None:
    given = torch.arange(12.0).view(3, 4)

    def block(number: int) -> None:
        factor, last, name = number / 4e5, -(number // 100_000), {"dim": 1, "keepdim": number > 9}
        with identity.trace(given):
            value = identity[0].output
            value[:2, last] = torch.nan  # equal to nothing, also not to itself
            most = (value * factor + number)[..., last - 1 :].amax(**name).save()
        expected = given.clone()
        expected[:2, last] = torch.nan
        expected = (expected * factor + number)[..., last - 1 :].amax(**name)
        torch.testing.assert_close(most.value, expected, equal_nan=True)

    for _ in range(3):
        block(int("300000"))  # too large to be one object always
    count = len(planned)
    for _ in range(3):
        block(int("300000"))
    assert len(planned) == count


def test_the_same_experiment_at_other_lines_has_the_same_plan(
    gpt2: LanguageModel, planned: list[int]
) -> None:
    ids = torch.randint(100, (1, 5))

    def one(number: float, position: int) -> Any:
        with gpt2.trace(ids):
            gpt2.transformer.h[1].output[0][:, position] *= number
            return gpt2.lm_head.output.save()

    def other(number: float, position: int) -> Any:
        with gpt2.trace(ids) as tracer:
            block = gpt2.transformer.h[1]
            hidden = block.output[0]
            hidden[:, position] *= number
            logits = gpt2.lm_head.output

            kept = logits.save()
        assert len(tracer.plan.passes) == 1
        return kept

    expected = one(2.0, 1).value
    count = len(planned)
    assert torch.equal(other(2.0, 1).value, expected)
    assert len(planned) == count
    other(2.0, 2)  # another experiment
    assert len(planned) == count + 1


def test_a_line_of_a_loop_over_layers_is_planned_once_a_layer(
    gpt2: LanguageModel, planned: list[int]
) -> None:
    ids = torch.randint(100, (1, 5))

    def sweep() -> list[torch.Tensor]:
        found = []
        for block in gpt2.transformer.h:
            with gpt2.trace(ids):
                found.append(block.output[0].save())
        return [one.value for one in found]

    first = sweep()
    count = len(planned)
    for one, again in zip(first, sweep(), strict=True):
        assert torch.equal(one, again)
    assert len(planned) == count


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if line.endswith(text))


def test_an_error_names_the_line_of_its_own_block_where_a_plan_is_shared(
    identity: Model, planned: list[int]
) -> None:
    given = torch.arange(4.0)

    def one(position: int) -> None:
        at = torch.tensor([position])
        with identity.trace(given):
            identity[0].output[at].save()  # line of one

    def other(position: int) -> None:
        at = torch.tensor([position])

        with identity.trace(given):
            identity[0].output[at].save()  # line of other

    one(1)
    count = len(planned)
    other(1)
    for block, text in ((one, "# line of one"), (other, "# line of other"), (one, "# line of one")):
        with pytest.raises(insitu.InsituError) as caught:
            block(9)
        message = str(caught.value)
        assert f"line {line_of(text)}" in message and text in message
    assert len(planned) == count


class Choosing(nn.Module):
    """Calls its inner module for positive numbers only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.sum() > 0 else x


def test_a_module_that_was_not_called_is_named_at_its_own_line(planned: list[int]) -> None:
    model = Model(Choosing())

    def one(sign: float) -> None:
        with model.trace(torch.ones(2) * sign):
            model.inner.output.save()  # read in one

    def other(sign: float) -> None:
        with model.trace(torch.ones(2) * sign):
            model.inner.output.save()  # read in other

    one(1.0)
    other(1.0)
    count = len(planned)
    for block, text in ((one, "# read in one"), (other, "# read in other")) * 2:
        with pytest.raises(insitu.NeverRanError) as caught:
            block(-1.0)
        assert f"line {line_of(text)}" in str(caught.value)
    assert len(planned) == count == 1


def test_a_job_that_was_received_has_the_plan_of_its_block(
    gpt2: LanguageModel, planned: list[int]
) -> None:
    with gpt2.trace(torch.arange(5).view(1, 5)) as tracer:
        gpt2.transformer.h[1].output[0][:, 1:3] *= 2.0
        kept = gpt2.lm_head.output[:, -1].save("logits")
    count = len(planned)
    received = insitu.Job.from_bytes(tracer.job.to_bytes())
    assert torch.equal(gpt2.run(received)["logits"], kept.value)
    assert len(planned) == count


def test_plans_of_the_same_content_are_told_apart_by_numbers_that_are_equal(
    identity: Model, planned: list[int]
) -> None:
    given = torch.arange(4)

    def one() -> torch.Tensor:
        with identity.trace(given):
            return (identity[0].output * 2).save()

    def other() -> torch.Tensor:
        with identity.trace(given):
            return (identity[0].output * 2.0).save()

    assert one().dtype is torch.int64 and other().dtype is torch.float32
    assert len(planned) == 2


def test_a_number_that_no_tensor_is_compared_with_does_not_stand_in_the_way_of_tensors() -> None:
    model = Model(torch.nn.Identity())
    results: list[torch.Tensor] = []
    for value in (10**30, torch.ones(1), -(2**63) - 1, torch.ones(1, dtype=torch.uint8)):
        try:
            with model.trace(torch.zeros(1)):
                made = (model.output + value).save()
            results.append(made.value)
        except insitu.InsituError:  # PyTorch takes no such integer
            results.append(torch.zeros(0))
    assert [len(one) for one in results] == [0, 1, 0, 1]


@pytest.mark.thorough
def test_a_node_is_few_objects_for_the_garbage_collector(identity: Model) -> None:
    # Else a full collection falls into long blocks, which then take much longer than short ones.
    def written(count: int) -> int:
        with identity.trace(torch.zeros(3, 4)):
            for number in range(count):
                identity[0].output[:, number % 3] += 1.0
                identity[0].output[1, number % 4] = float(number)
            identity.output.save()
        gc.collect()
        return len(gc.get_objects())

    written(602)  # what all graphs share is there then
    before = written(20)
    assert written(600) - before < 600 * 18
