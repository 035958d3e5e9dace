import pytest
import torch

from insitu.graph.operations import BY_FUNCTION, BY_NAME, TENSOR_METHODS, Operation


@pytest.mark.parametrize("operation", BY_NAME.values(), ids=lambda operation: operation.name)
def test_every_operation_is_found_by_its_name_and_its_function(operation: Operation) -> None:
    assert BY_NAME[operation.name] is operation
    assert BY_FUNCTION[operation.function].function is operation.function


@pytest.mark.parametrize(
    "impure",
    [
        "torch.rand_like",
        "torch.dropout",
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
        "functional.dropout",
        "functional.gumbel_softmax",
    ],
)
def test_operations_that_are_not_pure_are_not_in_the_list(impure: str) -> None:
    assert impure not in BY_NAME


def test_nothing_that_writes_in_place_or_is_a_dunder_is_in_the_list() -> None:
    names = {operation.short for operation in BY_NAME.values()} - {"and_", "or_"}
    assert not [name for name in names if name.endswith("_") or name.startswith("_")]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_tensor_method_leaves_its_operand_unwritten() -> None:
    """Runs whatever works without further arguments and compares torch's own write counter."""
    ran = 0
    for operation in TENSOR_METHODS:
        for tensor in (torch.rand(3, 3) + 0.1, torch.ones(3, 3, dtype=torch.int64)):
            try:
                operation.function(tensor)
            except (TypeError, RuntimeError, AssertionError, IndexError):
                continue
            ran += 1
            assert tensor._version == 0, operation.name
    assert ran > 200
