"""The part of a layer that makes queries, keys or values, without a copy where it can be."""

# pyright: reportPrivateUsage=false

from typing import Any

import pytest
import torch

from insitu import LanguageModel
from insitu.models.head_projections import HeadProjection, _rows_of, head_projection
from tests.fidelity.zoo import module_of


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "phi3", "gpt-bigcode"])
def test_a_layer_makes_of_unit_vectors_what_the_weights_of_its_heads_say(name: str) -> None:
    model = LanguageModel(module_of(name))
    names: Any = model.vocabulary
    block = names.body.blocks()[model.blocks[0].path]
    for letter in "qkv":
        found = head_projection(names.weights, block, block.attention, letter)
        assert isinstance(found, HeadProjection)
        layer: Any = model.modules[found.path]
        with torch.no_grad():
            made = layer(torch.eye(16)) - layer(torch.zeros(1, 16))
        torch.testing.assert_close(found.weight, made[:, found.columns].permute(1, 2, 0))
        assert found.weight.untyped_storage().data_ptr() == (
            layer.weight.untyped_storage().data_ptr()
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_at_unequal_distances_are_copied(transposed: bool) -> None:
    matrix = torch.randn(8, 5).T if transposed else torch.randn(5, 8)
    for columns in ([[0, 1], [5, 6], [2, 3]], [[7, 6], [1, 0]], [[0, 1], [0, 1]], [[3, 5], [4, 6]]):
        index = torch.tensor(columns)
        assert torch.equal(_rows_of(matrix, index), matrix[:, index].permute(1, 2, 0))
