"""An invocation that fails takes the values of those that use it, and of no other.

What the others save is compared with plain hooks on their prompts alone.
"""

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from insitu import (
    ExecutionError,
    InsituError,
    LanguageModel,
    Model,
    NeverRanError,
    NoValueError,
    ShapeError,
    apply,
)
from tests.around import Around
from tests.conftest import hooked_hidden, tiny_gpt2, tiny_llama
from tests.fidelity.test_steps_together import alone
from tests.thinning import sampled, thinned

PROMPTS = [torch.tensor([ids]) for ids in ([5, 6, 7], [8, 9, 10, 11, 2], [3, 1], [4, 4, 9, 20])]
ALIKE = [torch.tensor([[5, 6, 7, 8]])] * 4


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Checks that a model is left as it was."""
    before = {
        name: (set(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in module.named_modules()
    }
    grads = [weight.grad for weight in module.parameters()]
    yield
    after = {
        name: (set(vars(part)), len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in module.named_modules()
    }
    assert after == before
    assert [weight.grad for weight in module.parameters()] == grads
    assert torch.is_grad_enabled()


def logits_of(module: nn.Module, ids: torch.Tensor, add: float = 0.0, layer: int = 1) -> Any:
    """The logits of a prompt alone, with something added to a layer's output by a plain hook."""

    def hook(part: Any, args: Any, output: Any) -> Any:
        new = (output[0] if isinstance(output, tuple) else output) + add
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.get_submodule(f"transformer.h.{layer}").register_forward_hook(hook)
    try:
        with torch.no_grad():
            return module(ids, use_cache=False).logits
    finally:
        handle.remove()


def a_shape(model: LanguageModel) -> Any:
    return model.transformer.h[0].output[0].reshape(7, 1111)


def a_late_shape(model: LanguageModel) -> Any:
    return model.lm_head.output.reshape(7, 1111)


def a_value(model: LanguageModel) -> Any:
    return torch.linalg.inv(model.transformer.h[1].output[0][0, :2, :2] * 0)


def a_function(model: LanguageModel) -> Any:
    def fails(value: torch.Tensor) -> torch.Tensor:
        raise KeyError("own")

    return apply(fails, model.transformer.h[2].output[0])


def a_write(model: LanguageModel) -> Any:
    """Writes in vain behind a write that is in force."""
    model.transformer.h[0].output[0][:] = 3.0
    model.transformer.h[2].output[0][:] = model.transformer.h[1].output[0].reshape(9, 1111)
    return model.lm_head.output


def too_late(model: LanguageModel) -> Any:
    """Writes what was not there when the model passed, which only the run finds out."""
    model.transformer.h[0].output[0][:] = 3.0
    inverse = torch.linalg.inv(model.transformer.h[0].output[0][0, :2, :2] * 0)
    model.transformer.h[1].output[0][:, :2, :2] = inverse
    return inverse


FAILING = [a_shape, a_late_shape, a_value, a_function, a_write, too_late]


@pytest.mark.parametrize("fails", sampled(FAILING, [a_shape, a_late_shape, a_value]))
@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE], ids=["ragged", "of one prompt"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"max_tokens_per_pass": 1}, marks=pytest.mark.slow),
        pytest.param({"share_prefixes": True}, marks=pytest.mark.thorough),
    ],
)
def test_the_others_have_what_they_have_alone(
    model: LanguageModel,
    fails: Callable[..., Any],
    prompts: list[torch.Tensor],
    options: dict[str, Any],
) -> None:
    saved = {}
    with whole(model.module):
        with pytest.raises(InsituError) as caught:
            with model.trace(**options) as tracer:
                for number, ids in enumerate(prompts):
                    with tracer.invoke(ids):
                        if number == 1:
                            lost = fails(model).save()
                            also = model.lm_head.output.save()
                        else:
                            model.transformer.h[1].output[0][:] += float(number)
                            saved[number] = model.lm_head.output.save()
    assert __file__.rpartition("/")[2] in str(caught.value)
    assert caught.value.location is not None
    for number, value in saved.items():
        expected = logits_of(model.module, prompts[number], float(number))
        assert torch.allclose(value.value, expected, atol=1e-5), number
    for value in (lost, also):
        with pytest.raises(NoValueError, match=f"its run raised {type(caught.value).__name__}"):
            _ = value.value
    assert "invocation 1 raised" in tracer.plan.explain()


def test_what_uses_a_failed_invocation_is_lost_with_it_and_says_so(model: LanguageModel) -> None:
    with pytest.raises(ShapeError, match="reshape"), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            bad = model.transformer.h[0].output[0].reshape(7, 1111).save()
            donor = model.transformer.h[0].output[0][:, -1]
        with tracer.invoke(PROMPTS[1]):
            model.transformer.h[1].output[0][:, -1] = donor
            one = model.transformer.h[2].output[0][:, -1].save()
        with tracer.invoke(PROMPTS[2]):
            model.transformer.h[3].output[0][:, -1] = one  # by way of the one before
            two = model.lm_head.output.save()
        with tracer.invoke(PROMPTS[3]):
            three = model.lm_head.output.save()
            difference = (three[:, -1] - two[:, -1]).save()
    for value in (one, two):
        with pytest.raises(NoValueError, match="something of invocation 0, whose run raised"):
            _ = value.value
    with pytest.raises(NoValueError, match="its run raised ShapeError"):
        _ = bad.value
    with pytest.raises(NoValueError, match="something of invocation 0"):
        _ = difference.value
    assert torch.allclose(three.value, logits_of(model.module, PROMPTS[3]), atol=1e-5)


def test_what_a_failed_invocation_uses_is_there(model: LanguageModel) -> None:
    with pytest.raises(ShapeError), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            donor = model.transformer.h[0].output[0][:, -1].save()
            own = model.lm_head.output.save()
        with tracer.invoke(PROMPTS[1]):
            bad = donor.reshape(7, 1111).save()  # of the other's value alone, in a line of this
            logits = model.lm_head.output.save()
    assert torch.allclose(own.value, logits_of(model.module, PROMPTS[0]), atol=1e-5)
    hidden = hooked_hidden(model.module, "transformer.h.0", PROMPTS[0])
    assert torch.allclose(donor.value, hidden[:, -1], atol=1e-5)
    for value in (bad, logits):
        with pytest.raises(NoValueError, match="its run raised"):
            _ = value.value


def test_a_line_outside_of_invocations_takes_its_own_value_alone(model: LanguageModel) -> None:
    with pytest.raises(ShapeError), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            one = model.lm_head.output.save()
        with tracer.invoke(PROMPTS[1]):
            two = model.lm_head.output.save()
        bad = (one - two).save()
        good = (one[:, -1] - two[:, -1]).save()
    expected = [logits_of(model.module, ids) for ids in PROMPTS[:2]]
    assert torch.allclose(one.value, expected[0], atol=1e-5)
    assert torch.allclose(two.value, expected[1], atol=1e-5)
    assert torch.allclose(good.value, expected[0][:, -1] - expected[1][:, -1], atol=1e-5)
    with pytest.raises(NoValueError, match="a line that it uses something of"):
        _ = bad.value


def test_the_first_is_raised_and_the_others_are_notes(model: LanguageModel) -> None:
    with pytest.raises(ShapeError) as caught, model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            with tracer.invoke(ids):
                if number == 2:
                    model.transformer.h[0].output[0].reshape(7, 222).save()  # the earlier site
                elif number == 1:
                    model.transformer.h[3].output[0].reshape(7, 111).save()
                else:
                    model.lm_head.output.save()
    assert "reshape(7, 111)" in str(caught.value)
    (note,) = caught.value.__notes__
    assert "ShapeError" in note and "reshape(7, 222)" in note and "line" in note


@pytest.mark.parametrize("count", [2, 3])
def test_a_step_that_comes_to_none_of_several_prompts_is_named(
    model: LanguageModel, count: int
) -> None:
    ends = list(range(model.config.vocab_size))  # the first token ends each
    with (
        pytest.raises(NeverRanError, match="Step 2 never came"),
        model.generate(max_new_tokens=5, eos_token_id=ends) as generator,
    ):
        for ids in PROMPTS[:count]:
            with generator.invoke(ids) as invoker, invoker.step(2):
                model.transformer.h[0].output[0][:, -1] += 1


@pytest.mark.thorough
def test_many_failures_take_few_runs(model: LanguageModel) -> None:
    saved, count = {}, 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    prompts = [torch.randint(1, 90, (1, 3 + number % 4)) for number in range(48)]
    with pytest.raises(ShapeError), model.trace() as tracer:
        for number, ids in enumerate(prompts):
            with tracer.invoke(ids):
                if number % 3 == 0:
                    apply(lambda value: value.reshape(5, counted() or 1234),
                          model.transformer.h[0].output[0]).save()  # fmt: skip
                else:
                    saved[number] = model.lm_head.output.save()
    assert count < 48
    for number, value in saved.items():
        assert torch.allclose(value.value, logits_of(model.module, prompts[number]), atol=1e-5)


class Picky(nn.Module):
    """Raises where its input is large, as a model's own check does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        if bool((x.abs() > 1e4).any()):
            raise ArithmeticError("an input is too large")
        return self.inner(x)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "prompts",
    [pytest.param(PROMPTS, marks=pytest.mark.thorough), ALIKE],
    ids=["ragged", "of one prompt"],
)
def test_a_failure_of_the_model_is_of_the_invocation_that_alone_fails(
    prompts: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny_gpt2()
    module.transformer.h[2].ln_1 = picky = Picky(module.transformer.h[2].ln_1)
    model = LanguageModel(module.eval())
    with model.trace(prompts[0]):
        model.lm_head.output.save()
    picky.rows.clear()
    saved = {}
    with whole(module), caplog.at_level(logging.INFO, "insitu"):
        with pytest.raises(ArithmeticError), model.trace() as tracer:
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids):
                    model.transformer.h[1].output[0][:] += 1e9 if number == 2 else float(number)
                    saved[number] = model.lm_head.output.save()
    with pytest.raises(NoValueError, match="its run raised ArithmeticError"):
        _ = saved.pop(2).value
    for number, value in saved.items():
        expected = logits_of(module, prompts[number], float(number))
        assert torch.allclose(value.value, expected, atol=1e-5), number
    assert "raised ArithmeticError" in caplog.text
    assert "raised ArithmeticError" in tracer.plan.explain()


class Small(nn.Module):
    """Has no memory for more than some tokens at a time."""

    def __init__(self, inner: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.most, self.error = inner, most, error
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[0] * x.shape[1])
        if self.seen[-1] > self.most:
            raise self.error
        return self.inner(x)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.thorough
@pytest.mark.parametrize("error", thinned(MEMORY, MEMORY[:1]), ids=["device", "cpu", "python"])
@pytest.mark.parametrize("generating", sampled([False, True], [False]), ids=["trace", "generation"])
def test_memory_that_runs_out_halves_the_passes_and_is_said(
    error: Exception, generating: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module = tiny_gpt2()
    module.transformer.h[1].ln_2 = small = Small(module.transformer.h[1].ln_2, 1000, error)
    model = LanguageModel(module.eval())
    options: dict[str, Any] = {"max_new_tokens": 3} if generating else {}
    run = model.generate if generating else model.trace
    prompts = [torch.randint(1, 90, (1, 5)) for _ in range(8)]
    saved = []

    def block() -> Any:
        saved.clear()
        with run(**options) as tracer:
            for number, ids in enumerate(prompts):
                with tracer.invoke(ids):
                    model.transformer.h[1].output[0][:] += float(number)
                    saved.append(model.lm_head.output[:, -1].save())
        return tracer

    assert len(block().plan.passes) == 1
    small.most = 12
    with caplog.at_level(logging.INFO, "insitu"), whole(module):
        tracer = block()
    small.most = 1000
    for number, value in enumerate(saved):
        expected = logits_of(module, prompts[number], float(number))[:, -1]
        assert torch.allclose(value.value, expected, atol=1e-5), number
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    assert "memory ran out in a pass of 8 invocations" in caplog.text
    assert "memory ran out in a pass of 8 invocations" in tracer.plan.explain()
    assert len(tracer.plan.passes) >= 4
    if generating:
        assert tracer.output.shape == (8, 8)


def test_an_invocation_for_which_alone_memory_runs_out_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = tiny_gpt2()
    module.transformer.h[1].ln_2 = small = Small(module.transformer.h[1].ln_2, 1000, MEMORY[0])
    model = LanguageModel(module.eval())
    prompts = [torch.randint(1, 90, (1, length)) for length in (3, 4, 20, 4, 5)]
    with model.trace(prompts[0]):
        model.lm_head.output.save()
    small.most = 8
    saved = []
    with pytest.raises(torch.OutOfMemoryError), model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                saved.append(model.lm_head.output.save())
    small.most = 1000
    for number, value in enumerate(saved):
        if number == 2:
            with pytest.raises(NoValueError, match="its run raised OutOfMemoryError"):
                _ = value.value
        else:
            assert torch.allclose(value.value, logits_of(module, prompts[number]), atol=1e-5)


@pytest.mark.parametrize("step", sampled([0, 1, 3, None], [1, None]))
@pytest.mark.parametrize("make", sampled([tiny_gpt2, tiny_llama], [tiny_gpt2]))
def test_a_step_that_fails_is_of_its_generation_alone(
    step: int | None, make: Callable[..., Any]
) -> None:
    model = LanguageModel(make())
    head, layer = "lm_head", "transformer.h.1" if make is tiny_gpt2 else "model.layers.1"
    block = model.transformer.h[1] if make is tiny_gpt2 else model.model.layers[1]
    saved: dict[int, list[Any]] = {}
    invokers = []
    with whole(model.module), pytest.raises(ShapeError):
        with model.generate(max_new_tokens=5, eos_token_id=None, do_sample=False) as generator:
            for number, ids in enumerate(PROMPTS):
                with generator.invoke(ids) as invoker:
                    invokers.append(invoker)
                    if number == 1 and step is None:
                        with invoker.every_step():
                            lost = block.output[0].reshape(7, 1111).save()
                    elif number == 1:
                        with invoker.step(step):
                            lost = block.output[0].reshape(7, 1111).save()
                    else:
                        saved[number] = []
                        for at in range(5):
                            with invoker.step(at):
                                block.output[0][:] += number + at / 10
                                saved[number].append(model.lm_head.output[:, -1].save())
    with pytest.raises(NoValueError, match="its run raised"):
        _ = lost.value
    with pytest.raises(NoValueError):
        _ = generator.output
    with pytest.raises(NoValueError):
        _ = invokers[1].output
    for number, values in saved.items():
        changes = {layer: lambda at, x, number=number: x + (number + at / 10)}
        tokens, seen = alone(model, PROMPTS[number], head, changes)
        assert torch.equal(invokers[number].output, tokens)
        for value, expected in zip(values, seen, strict=True):
            assert torch.allclose(value.value, expected[:, -1], atol=1e-5)


def gradient_alone(module: nn.Module, ids: torch.Tensor, scale: float) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def hook(part: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        kept.append(hidden.view_as(hidden))
        return (kept[0], *output[1:]) if isinstance(output, tuple) else kept[0]

    handle = module.transformer.h[1].register_forward_hook(hook)
    try:
        loss = (module(ids, use_cache=False).logits[:, -1] * scale).sum()
        return torch.autograd.grad(loss, kept[0])[0]
    finally:
        handle.remove()


class Raising(torch.autograd.Function):
    """Fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("no way back")


def no_number(model: LanguageModel, loss: Any) -> Any:
    grad = model.transformer.h[1].output[0].grad.save()
    model.lm_head.output.backward()
    return grad


def no_way(model: LanguageModel, loss: Any) -> Any:
    grad = model.transformer.h[1].output[0].grad.save()
    torch.linalg.inv(model.transformer.h[2].output[0][0, :2, :2] * 0)
    loss.backward()
    return grad


def of_a_gradient(model: LanguageModel, loss: Any) -> Any:
    grad = model.transformer.h[1].output[0].grad.reshape(7, 1111).save()
    loss.backward()
    return grad


def of_nothing(model: LanguageModel, loss: Any) -> Any:
    grad = model.transformer.h[2].output[0].grad.save()
    model.transformer.h[0].output[0].sum().backward()
    return grad


def on_its_way_back(model: LanguageModel, loss: Any) -> Any:
    grad = model.transformer.h[1].output[0].grad.save()
    apply(Raising.apply, loss).backward()
    return grad


@pytest.mark.parametrize("fails", [no_number, no_way, of_a_gradient, of_nothing, on_its_way_back])
@pytest.mark.parametrize("options", sampled([{}, {"max_tokens_per_pass": 1}], [{}]))
def test_gradients_of_the_others_are_theirs(
    model: LanguageModel, fails: Callable[..., Any], options: dict[str, Any]
) -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    scale.grad = torch.tensor(5.0)
    grads = {}
    with whole(model.module), pytest.raises(InsituError):
        with model.trace(**options) as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    loss = (model.lm_head.output[:, -1] * scale).sum()
                    if number == 1:
                        lost = fails(model, loss)
                    else:
                        grads[number] = model.transformer.h[1].output[0].grad.save()
                        loss.backward()
    with pytest.raises(NoValueError, match="its run raised"):
        _ = lost.value
    sums = torch.tensor(5.0)
    for number, grad in grads.items():
        assert torch.allclose(
            grad.value, gradient_alone(model.module, PROMPTS[number], 2.0), atol=1e-5
        )
        sums = sums + logits_of(model.module, PROMPTS[number])[:, -1].sum()
    assert torch.allclose(scale.grad, sums, atol=1e-3)


def test_a_backward_pass_of_the_model_that_fails_is_repeated_for_each() -> None:
    class Checked(Raising):
        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            if bool((gradient.abs() > 1e4).any()):
                raise ArithmeticError("a gradient is too large")
            return gradient

    module = tiny_gpt2()
    module.transformer.h[2].ln_1 = Around(
        module.transformer.h[2].ln_1, lambda inner, x: Checked.apply(inner(x))
    )
    model = LanguageModel(module.eval())
    grads = {}
    with whole(module), pytest.raises(ExecutionError, match="too large"):
        with model.trace() as tracer:
            for number, ids in enumerate(PROMPTS):
                with tracer.invoke(ids):
                    grads[number] = model.transformer.h[1].output[0].grad.save()
                    scale = 1e12 if number == 2 else 3.0
                    (model.lm_head.output[:, -1] * scale).sum().backward()
    with pytest.raises(NoValueError, match="its run raised"):
        _ = grads.pop(2).value
    for number, grad in grads.items():
        expected = gradient_alone(module, PROMPTS[number], 3.0)
        assert torch.allclose(grad.value, expected, atol=1e-5)


class Counting(nn.Module):
    """Counts its calls in a buffer, so that a repeated call would show."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.second(torch.relu(self.first(x)))


@pytest.mark.no_wire  # it runs once more
def test_passes_that_are_done_are_not_repeated() -> None:
    torch.manual_seed(0)
    module = Counting().eval()
    model = Model(module)
    inputs = [torch.randn(2, 4) for _ in range(4)]
    saved = {}
    with whole(module), pytest.raises(ShapeError), model.trace() as tracer:
        for number, x in enumerate(inputs):
            with tracer.invoke(x):
                if number == 1:
                    model.first.output.reshape(5, 1111).save()
                else:
                    saved[number] = model.second.output.save()
    assert int(module.calls) == 4
    for number, value in saved.items():
        expected = module.second(torch.relu(module.first(inputs[number])))
        assert torch.equal(value.value, expected)


def test_a_site_that_is_not_passed_is_of_its_invocation_alone() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.large(x) if bool(x.sum() > 0) else self.small(x)

    torch.manual_seed(0)
    module = Choosing().eval()
    model = Model(module)
    with pytest.raises(InsituError, match="small"), model.trace() as tracer:
        with tracer.invoke(torch.ones(1, 4)):
            model.small.output.save()
        with tracer.invoke(torch.ones(1, 4)):
            good = model.large.output.save()
    assert torch.equal(good.value, module.large(torch.ones(1, 4)))


def test_an_interrupt_ends_all(model: LanguageModel) -> None:
    def interrupt(value: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    saved = []
    with whole(model.module), pytest.raises(KeyboardInterrupt), model.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            saved.append(model.lm_head.output.save())
        with tracer.invoke(PROMPTS[1]):
            apply(interrupt, model.transformer.h[0].output[0]).save()
    with pytest.raises(NoValueError, match="KeyboardInterrupt"):
        _ = saved[0].value


def test_a_prompt_that_alone_is_left_runs_alone(model: LanguageModel) -> None:
    with pytest.raises(ShapeError), model.generate(max_new_tokens=2) as generator:
        with generator.invoke(PROMPTS[0]):
            model.transformer.h[0].output[0].reshape(7, 1111).save()
        with generator.invoke(PROMPTS[1]) as invoker:
            logits = model.lm_head.output[:, -1].save()
    assert torch.allclose(logits.value, logits_of(model.module, PROMPTS[1])[:, -1], atol=1e-5)
    tokens, _ = alone(model, PROMPTS[1], "lm_head", max_new_tokens=2)
    assert torch.equal(invoker.output[:, :6], tokens[:, :6])


class _Catching(nn.Module):
    """Catches what its part raises, as decorators of Transformers do: it tries once more."""

    def __init__(self, words_it_anew: bool) -> None:
        super().__init__()
        self.part = nn.Linear(4, 4)
        self.words_it_anew = words_it_anew

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return self.part(x)
        except Exception:
            again = self.part(x)
            if self.words_it_anew:
                raise TypeError("something else") from None
            return again


@pytest.mark.parametrize("words_it_anew", [False, True])
def test_what_a_line_raises_is_raised_whatever_the_model_makes_of_it(words_it_anew: bool) -> None:
    model, x = Model(_Catching(words_it_anew)), torch.ones(2, 4)
    index = torch.tensor([9])
    with pytest.raises(ShapeError, match="index 9 is out of bounds"):
        with model.trace(x):
            model.part.output[index].save()
            model.output.save()
    with model.trace(x):
        right = model.output.save()
    assert torch.equal(right, model.module.part(x))


class _GoingOn(nn.Module):
    """Goes on without what its first part makes, if that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.whole = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with contextlib.suppress(Exception):
            x = self.first(x)
        with contextlib.suppress(Exception):
            self.whole(torch.arange(3))
        with contextlib.suppress(Exception):
            return self.second(x)
        return x


def _bad_skip(model: Any) -> None:
    model.first.skip(torch.ones(3, 5))


def _bad_write(model: Any) -> None:
    model.first.output = model.first.output[[0, 0, 1]]


def _gradient_of_integers(model: Any) -> None:
    model.whole.output.grad.save()
    model.second.output.sum().backward()


def _two_bad_lines(model: Any) -> None:
    index = torch.tensor([9])
    taken = model.first.output[index]
    model.second.output = model.second.output + taken


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (_bad_skip, "cannot be given this value by `skip`"),
        (_bad_write, "cannot be given this value"),
        (_gradient_of_integers, "only tensors of floats have a gradient"),
        (_two_bad_lines, "index 9 is out of bounds"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_no_model_goes_on_after_a_line_that_fails(
    lines: Callable[[Any], None], said: str, several: bool
) -> None:
    model, x = Model(_GoingOn()), torch.ones(2, 4)
    with pytest.raises(ShapeError, match=said) as raised:
        if several:
            with model.trace() as tracer:
                with tracer.invoke(x):
                    lines(model)
                with tracer.invoke(x):
                    other = model.output.save()
        else:
            with model.trace(x):
                lines(model)
    assert raised.value.location is not None
    assert raised.value.location.code.co_name == lines.__name__
    if several:
        assert torch.equal(other, model.module(x))
    with model.trace(x):
        right = model.output.save()
    assert torch.equal(right, model.module(x))


@pytest.mark.no_wire  # it keeps values
def test_a_failure_goes_with_its_block() -> None:
    model, x = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), torch.ones(2, 4)

    def fails() -> weakref.ref[InsituError] | None:
        try:
            with model.trace() as tracer:
                with tracer.invoke(x):
                    model[0].output[torch.tensor([9])].save()
                with tracer.invoke(x):
                    model[1].output.save()
        except InsituError as error:
            return weakref.ref(error)
        return None

    gc.collect()
    gc.disable()
    try:
        failure = fails()
        assert failure is not None
        assert failure() is None
    finally:
        gc.enable()
