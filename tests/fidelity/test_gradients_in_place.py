"""Gradients in random models that write in place, against the same models without such writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from insitu import ExecutionError, Model
from tests.fidelity.test_gradients import Given

Tensor = torch.Tensor


class Residual(nn.Module):
    """A block whose stream is added up in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(in_place), nn.Linear(4, 4))
        self.relu, self.in_place = nn.ReLU(in_place), in_place

    def forward(self, value: Tensor) -> Tensor:
        added = self.inner(value)
        return self.relu(added.add_(value) if self.in_place else added + value)


def _add_one(in_place: bool) -> nn.Module:
    return Given((lambda value: value.add_(1)) if in_place else (lambda value: value + 1))


KINDS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda in_place: nn.Linear(4, 4),
    "relu": nn.ReLU,
    "residual": Residual,
    "add": _add_one,
    "sine": lambda in_place: Given(torch.sin),
    "view": lambda in_place: Given(lambda value: value.view(value.shape)),
    "transposed": lambda in_place: Given(lambda value: value.transpose(0, 1)),
    "identity": lambda in_place: nn.Identity(),
}
REFUSED = ("the same memory by another name", "modified by an inplace operation")
WRITING = {"relu", "residual", "add"}


def built(kinds: list[str], in_place: bool) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), *(KINDS[kind](in_place) for kind in kinds))


def total(values: list[Any], last: Any) -> Any:
    return (last * last * last).sum() + sum((value * 0.5).sum() for value in values)


@pytest.mark.no_wire  # they are many
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6),
    chosen=st.sets(st.integers(0, 6), min_size=1, max_size=3),
    shape=st.sampled_from([(4, 4), (4, 3, 4)]),
    used=st.booleans(),
)
def test_a_gradient_is_of_the_value_that_was_read(
    kinds: list[str], chosen: set[int], shape: tuple[int, ...], used: bool
) -> None:
    sites = [site for site in sorted(chosen) if site <= len(kinds)]
    assume(sites)
    value = given_tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs: list[Tensor] = []
    for layer in built(kinds, False):
        value = layer(value)
        value = value.view_as(value)  # what passes here, which an identity hands on
        outputs.append(value)
    for site in sites:
        outputs[site].retain_grad()
    total([outputs[site] for site in sites] if used else [], value).backward()

    model = Model(built(kinds, True))
    try:
        with model.trace(given_tensor):
            values = [model[site].output for site in sites]
            grads = [value.grad.save() for value in values]
            total(values if used else [], model[len(kinds)].output).backward()
    except ExecutionError as error:
        assert any(reason in str(error) for reason in REFUSED)
        assert WRITING.intersection(kinds)
        return
    for site, grad in zip(sites, grads, strict=True):
        torch.testing.assert_close(grad.value, outputs[site].grad)


class Sometimes(nn.Module):
    """Writes into what it is given, if it is told to."""

    writes = False

    def forward(self, value: Tensor) -> Tensor:
        return value.mul_(2) if self.writes else value * 2


@pytest.mark.no_wire  # the module is another in the second run
def test_a_model_that_begins_to_write_in_place_is_never_silently_wrong() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), Sometimes(), nn.Linear(4, 4))
    model, value = Model(module), torch.randn(3, 4)

    def gradient() -> Tensor:
        with model.trace(value):
            grad = model[0].output.grad.save()
            model[2].output.square().sum().backward()
        return grad.value

    right = gradient()
    torch.testing.assert_close(gradient(), right)
    Sometimes.writes = True
    try:
        with pytest.raises(ExecutionError, match="Run the block once more"):
            gradient()
        for _ in range(2):
            torch.testing.assert_close(gradient(), right)
    finally:
        Sometimes.writes = False
    torch.testing.assert_close(gradient(), right)
