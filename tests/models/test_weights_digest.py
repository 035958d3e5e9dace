"""What the digest of weights tells apart."""

import pytest
import torch
from torch import nn

from insitu.models.weights_digest import weights_digest


def quantised(seed: int) -> nn.Module:
    quanto = pytest.importorskip("optimum.quanto")
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(32, 32, bias=False))
    quanto.quantize(module, weights=quanto.qint8)
    quanto.freeze(module)
    return module


def test_quantised_weights_are_told_apart() -> None:
    assert weights_digest(quantised(0)) == weights_digest(quantised(0))
    assert weights_digest(quantised(0)) != weights_digest(quantised(1))
