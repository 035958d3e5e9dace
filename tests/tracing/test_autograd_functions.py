"""A user's own `torch.autograd.Function` keeps its backward, as it does in a hook."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from insitu import (
    LanguageModel,
    Model,
    OperationError,
    UnknownShapeError,
    WireError,
    apply,
    cond,
    fold,
)
from tests.conftest import tiny_gpt2

PROMPT = [1, 2, 3, 4]
Function = torch.autograd.Function


class Straight(Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).to(x.dtype) * x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class Reverse(Function):
    """Gradient reversal: the forward does nothing to the value."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


class JumpReLU(Function):
    """As SAELens has it: a pseudo-derivative for the threshold."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> Any:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x * (x > threshold)).to(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.bandwidth / 2).to(x)
        slope = -(threshold / ctx.bandwidth) * near * grads[0]
        return (x > threshold) * grads[0], slope.sum(tuple(range(x.ndim - 1))), None


class Parts(NamedTuple):
    """What `Split` is told."""

    at: int
    name: str


class Split(Function):
    """Several inputs and outputs, arguments that are no tensors, and `setup_context`."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor, parts: Parts, scale: float = 3.0) -> Any:
        return x[..., : parts.at] * scale, y[..., parts.at :] + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, parts, scale = inputs
        ctx.at, ctx.scale, ctx.shape = parts.at, scale, x.shape

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        one, other = torch.zeros(ctx.shape), torch.zeros(ctx.shape)
        one[..., : ctx.at] = grads[0] * 10
        other[..., ctx.at :] = grads[1] * 100
        return one, other, None, None


def split(x: Any) -> Any:
    one, other = Split.apply(x, x * 2, Parts(5, "some"))
    return torch.cat([one, other * 2], -1)


def checkpointed(x: Any) -> Any:
    return checkpoint(lambda y: Straight.apply(y.sin()), x, use_reentrant=True)


def checkpointed_without_reentering(x: Any) -> Any:
    return checkpoint(lambda y: Straight.apply(y.sin()), x, use_reentrant=False)


def under_no_grad(x: Any) -> Any:
    with torch.no_grad():
        return Straight.apply(x)


def in_cond(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Straight.apply(x)
    return cond(x.isfinite().all(), Straight.apply, lambda y: y, x)


def in_fold(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        carry: Any = torch.zeros(4, 16)
        for item in x:
            carry = Reverse.apply(carry + item)
        return carry
    return fold(lambda carry, item: Reverse.apply(carry + item), torch.zeros(4, 16), x)


def of_kernels(x: Any) -> Any:
    return torch.ops.insitu_tests.scaled(x, 3.0)


@torch.library.custom_op("insitu_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


@torch.library.custom_op("insitu_tests::scale_", mutates_args=("x",))
def scale_(x: torch.Tensor, factor: float) -> None:
    x.mul_(factor)


scaled.register_fake(lambda x, factor: torch.empty_like(x))
scaled.register_autograd(lambda ctx, grad: (grad * 7, None))

FUNCTIONS = [
    *(Straight.apply, Reverse.apply, split, checkpointed, checkpointed_without_reentering),
    *(under_no_grad, in_cond, in_fold, of_kernels, lambda x: scaled(x, 2.0)),
]


def hidden_states(model: LanguageModel) -> torch.Tensor:
    kept: list[torch.Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.module.transformer.h[2].register_forward_hook(hook)
    with torch.no_grad():
        model.module(torch.tensor([PROMPT]))
    handle.remove()
    return kept[0].clone().requires_grad_()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_its_own_backward_counts(gpt2: LanguageModel, function: Callable[[Any], Any]) -> None:
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0]
        grad = x.grad.save()
        ours = function(x)
        (ours * x).sum().backward()
        ours = ours.save()
    x = hidden_states(gpt2)
    plain = function(x)
    (plain * x).sum().backward()
    torch.testing.assert_close(ours.value, plain.detach())
    torch.testing.assert_close(grad.value, x.grad)


class Autoencoder(nn.Module):
    """A sparse autoencoder with a threshold that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(16, 32), nn.Linear(32, 16)
        self.threshold = nn.Parameter(torch.full((32,), 0.1))

    def forward(self, x: Any) -> Any:
        return self.decoder(JumpReLU.apply(self.encoder(x), self.threshold, 0.5))


def test_an_autoencoder_with_a_trained_threshold(gpt2: LanguageModel) -> None:
    mine, plain = Autoencoder(), Autoencoder()
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0]
        reconstructed = mine(x)
        assert reconstructed.shape == (1, 4, 16)
        gpt2.transformer.h[2].output = reconstructed
        (reconstructed - x).square().sum().backward()
        saved = reconstructed.save()
    y = hidden_states(gpt2).detach()
    (plain(y) - y).square().sum().backward()
    torch.testing.assert_close(saved.value, plain(y).detach())
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, dict(plain.named_parameters())[name].grad)
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_parameters_that_only_a_function_knows_get_their_gradients(
    gpt2: LanguageModel, reentrant: bool
) -> None:
    mine, plain = Autoencoder(), Autoencoder()
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0]
        checkpoint(lambda h: mine(h), x, use_reentrant=reentrant).sum().backward()
        x.grad.save()
    checkpoint(lambda h: plain(h), hidden_states(gpt2), use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(mine.threshold.grad, plain.threshold.grad)
    mine.zero_grad()
    with gpt2.trace(PROMPT):
        apply(lambda h: mine(h).sum(), gpt2.transformer.h[2].output[0]).backward()
    torch.testing.assert_close(mine.threshold.grad, plain.threshold.grad)
    assert all(parameter.grad is None for parameter in gpt2.module.parameters())


def test_a_function_is_not_sent_and_is_named(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT) as tracer:
        Straight.apply(gpt2.transformer.h[2].output[0]).save()
    with pytest.raises(WireError, match=r"Straight\.apply"):
        tracer.job.to_bytes()
    with gpt2.trace(PROMPT) as tracer:
        scaled(gpt2.transformer.h[2].output[0], 2.0).save()
    with pytest.raises(WireError, match="insitu_tests::scaled"):
        tracer.job.to_bytes()


def test_after_the_run_and_without_recorded_values_it_is_torchs_own(gpt2: LanguageModel) -> None:
    with gpt2.trace(PROMPT):
        x = gpt2.transformer.h[2].output[0].save()
    torch.testing.assert_close(Straight.apply(x), Straight.apply(x.value))
    leaf = torch.randn(3, requires_grad=True)
    Straight.apply(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((3,), 2.0))
    compiled = torch.compile(lambda y: Straight.apply(y) * 3, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(leaf), Straight.apply(leaf) * 3)


def test_a_value_that_is_no_argument_is_refused(gpt2: LanguageModel) -> None:
    class Closure(Function):
        @staticmethod
        def forward(ctx: Any, scale: torch.Tensor) -> Any:
            return hidden * scale

    with pytest.raises(OperationError, match="that it is not given as an argument"):
        with gpt2.trace(PROMPT):
            hidden = gpt2.transformer.h[2].output[0]
            Closure.apply(torch.ones(16, requires_grad=True))


def test_an_operator_that_writes_is_refused() -> None:
    model = Model(nn.Linear(2, 2))
    with pytest.raises(OperationError, match="scale_"), model.trace(torch.ones(1, 2)):
        scale_(model.output, 2.0)


def test_a_forward_that_needs_data_has_no_shape_before_the_run() -> None:
    class Counts(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.ones(int(x.sum()))

    model = Model(nn.Identity())
    with pytest.raises(UnknownShapeError), model.trace(torch.ones(3)):
        print(Counts.apply(model.output).shape)
    with model.trace(torch.ones(3)):
        counted = Counts.apply(model.output).save()
    assert counted.value.shape == (3,)


def test_one_that_draws_leaves_the_random_state_to_the_run() -> None:
    class Noise(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(x.shape)

    model = Model(nn.Identity())
    torch.manual_seed(0)
    with model.trace(torch.zeros(3)):
        noise = Noise.apply(model.output)
        assert noise.shape == (3,)
        noise = noise.save()
    torch.manual_seed(0)
    assert torch.equal(noise.value, torch.randn(3))


def test_its_forward_sees_real_runs_only_unless_a_shape_is_asked_for(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    seen: list[bool] = []

    class Counts(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            seen.append(isinstance(x, FakeTensor))
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2

    model = LanguageModel(str(tmp_path))  # its weights are loaded by the run
    with model.trace(PROMPT):
        x = model.transformer.h[2].output[0]
        made = (Counts.apply(x) @ torch.ones(16, 2)).save()
        cond(x.isfinite().all(), lambda y: Counts.apply(y) @ torch.ones(16, 2), lambda y: y, x)
    assert made.value.shape == (1, 4, 2)
    assert seen == [False, False]
    with pytest.raises(UnknownShapeError, match="Python function"), model.trace(PROMPT):
        x = model.transformer.h[2].output[0]
        print(cond(x.isfinite().all(), Counts.apply, lambda y: y, x).shape)
    assert seen == [False, False]
