import operator
from typing import Any

import pytest
import torch

from insitu.graph.operations import BY_FUNCTION, BY_NAME, TENSOR_METHODS, unbounded

OWNERS: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "torch": torch,
    "functional": torch.nn.functional,
    "linalg": torch.linalg,
    "operator": operator,
}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_operation_is_what_its_name_says(name: str) -> None:
    operation = BY_NAME[name]
    assert operation.name == name
    owner, _, short = name.rpartition(".")
    if owner and name != "operator.setitem":  # which is one that also says what it fits into
        theirs = getattr(OWNERS[owner], short)
        found = unbounded(operation)
        assert found is theirs or found == theirs
        assert BY_FUNCTION[theirs].function is operation.function


@pytest.mark.parametrize(
    "impure",
    [
        "torch.empty_like",
        "torch.manual_seed",
        "torch.save",
        "torch.load",
        "Tensor.as_strided",
        "Tensor.data_ptr",
        "Tensor.storage",
        "Tensor.stride",
        "Tensor.new_empty",
        "Tensor.numpy",
        "Tensor.apply_",
        "Tensor.set_",
    ],
)
def test_operations_that_are_not_pure_are_not_in_the_list(impure: str) -> None:
    assert impure not in BY_NAME


def test_no_dunder_is_in_the_list_and_only_an_underscore_writes_in_place() -> None:
    for operation in BY_NAME.values():
        name = operation.short
        assert not name.startswith("_")
        if not operation.name.startswith("operator."):
            assert name.endswith("_") == operation.in_place, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_method_writes_into_its_operand_if_it_says_so() -> None:
    """Runs whatever works without further arguments and compares torch's own write counter."""
    ran = 0
    for operation in TENSOR_METHODS:
        for tensor in (torch.rand(3, 3) + 0.1, torch.ones(3, 3, dtype=torch.int64)):
            try:
                operation.function(tensor)
            except (TypeError, RuntimeError, AssertionError, IndexError):
                continue
            ran += 1
            assert tensor._version == operation.in_place, operation.name
    assert ran > 200
