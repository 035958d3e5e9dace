"""What norms are found to do, also those that do not say what they add to the squares."""

import pytest
import torch
from torch import nn

from insitu.models.norms import norm_of
from tests.fidelity.zoo import module_of


class Silent(nn.Module):
    """A norm that keeps what it adds to the squares to itself."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(value, value.shape[-1:], eps=3e-6)


@pytest.mark.parametrize(
    ("module", "centred", "eps"),
    [
        (nn.LayerNorm(16, eps=1e-4), True, 1e-4),
        (nn.RMSNorm(16, eps=1e-3), False, 1e-3),
        (Silent(), True, 3e-6),
        (module_of("olmo").get_submodule("model.norm"), True, 1e-5),
    ],
)
def test_a_norm_is_known_by_what_it_does(module: nn.Module, centred: bool, eps: float) -> None:
    norm = norm_of(module, "norm", 16)
    assert norm is not None and norm.centred is centred and norm.eps == pytest.approx(eps)
    given = 1e-3 * torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    centre = norm.centre(given)
    assert torch.allclose(centre / norm.scale(centre), module(given), rtol=1e-4)


@pytest.mark.parametrize("module", [nn.Identity(), nn.Tanh(), nn.Linear(16, 16), nn.GELU()])
def test_what_does_something_else_is_no_norm(module: nn.Module) -> None:
    assert norm_of(module, "norm", 16) is None
