"""What a norm does, found out by trying it."""

from typing import Any

import pytest
import torch
from torch import nn

from insitu.models.norms import Norm, norm_of

WIDTH = 8


class WithScale(nn.Module):
    """Gives what it makes, and what it divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, value: torch.Tensor) -> Any:
        return value * self.weight, value.norm()


class Pooled(WithScale):
    def forward(self, value: torch.Tensor) -> Any:
        return (value * self.weight).sum()


class Refusing(WithScale):
    def forward(self, value: torch.Tensor) -> Any:
        raise ValueError("not this")


@pytest.mark.parametrize("kind", [WithScale, Pooled, Refusing, nn.Identity])
@pytest.mark.parametrize("eps", [None, 1e-5])
def test_what_divides_by_nothing_is_no_norm_and_no_fault_of_ours(kind: Any, eps: Any) -> None:
    module: Any = kind()
    if eps is not None:
        module.eps = eps
    assert norm_of(module, "norm", WIDTH) is None  # a fault that is logged fails the test


def test_norms_are_found_with_what_they_add_to_the_variance() -> None:
    hidden = nn.LayerNorm(WIDTH, 1e-6)
    nn.init.normal_(hidden.weight)

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = hidden

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return self.inner(value)

    assert norm_of(nn.LayerNorm(WIDTH, 1e-5), "a", WIDTH) == Norm("a", True, 1e-5)
    assert norm_of(nn.RMSNorm(WIDTH, 1e-4), "b", WIDTH) == Norm("b", False, 1e-4)
    assert norm_of(Hiding(), "c", WIDTH) == Norm("c", True, 1e-6)
