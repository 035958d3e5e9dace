"""What the digest of weights tells apart."""

import pytest
import torch
from torch import nn

from insitu.models.weights_digest import KnownDigest, have_other_values, weights_digest


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


def test_values_are_compared_where_the_tensors_are_the_same() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    digest, others = weights_digest(one), weights_digest(other)
    assert have_other_values(digest, others) and not have_other_values(digest, digest)
    assert not have_other_values(digest, weights_digest(nn.Linear(8, 9)))
    assert not have_other_values(digest, weights_digest(other.double()))
    assert not have_other_values(digest, "")


def test_what_files_do_not_have_is_not_of_the_digest() -> None:
    module = nn.BatchNorm1d(4)
    module.register_buffer("angles", torch.zeros(3), persistent=False)
    before = weights_digest(module)
    module.get_buffer("angles").add_(1)
    assert weights_digest(module) == before
    module.get_buffer("running_mean").add_(1)
    assert weights_digest(module) != before


def test_a_known_digest_follows_what_is_written() -> None:
    module, known = nn.Linear(8, 8), KnownDigest()
    assert known.of(module) == known.of(module) == weights_digest(module)
    nn.init.ones_(module.weight)
    assert known.of(module) == weights_digest(module)
    module.bias = nn.Parameter(torch.full((8,), 7.0))
    assert known.of(module) == weights_digest(module)
