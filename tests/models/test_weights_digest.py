"""What the digest of weights tells apart."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from insitu.models.weights_digest import have_other_values, weights_digest


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


class Packed(torch.Tensor):
    """A tensor of a class of its own, as libraries for quantised weights have them."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, flattens: bool) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers: torch.Tensor, flattens: bool) -> None:
        self.numbers = numbers
        if flattens:
            self.__tensor_flatten__ = lambda: (["numbers"], None)
            self.__tensor_unflatten__ = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def packed(number: float, flattens: bool) -> nn.Module:
    module = nn.Module()
    module.register_buffer("weight", Packed(torch.full((4, 4), number), flattens))
    return module


def test_tensors_of_a_class_of_its_own_are_told_apart_by_their_parts() -> None:
    assert weights_digest(packed(0, True)) == weights_digest(packed(0, True))
    assert weights_digest(packed(0, True)) != weights_digest(packed(1, True))


def test_a_tensor_without_numbers_is_told_of() -> None:
    with pytest.warns(UserWarning, match="Packed gives no numbers"):
        weights_digest(packed(0, False))


@pytest.mark.filterwarnings("ignore:.*(Sparse|quantized)")
@pytest.mark.parametrize(
    "changed",
    [
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_mkldnn,
        lambda numbers: torch.quantize_per_tensor(numbers, 0.1, 0, torch.qint8),
    ],
)
def test_tensors_in_other_layouts_are_told_apart(changed: Callable) -> None:
    def digest(*numbers: float) -> str:
        module = nn.Module()
        module.register_buffer("weight", changed(torch.tensor([numbers])))
        return weights_digest(module)

    assert digest(0.0, 1.0) == digest(0.0, 1.0)
    assert len({digest(0.0, 1.0), digest(1.0, 0.0), digest(0.0, 2.0)}) == 3


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
