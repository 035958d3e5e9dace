"""That the small models are what they are said to be."""

import pytest
import torch
from torch import nn

from tests.fidelity.zoo import EVERY, ZOO, module_of


def test_each_name_is_there_once() -> None:
    assert len({one.name for one in EVERY}) == len(EVERY)


@pytest.mark.parametrize("name", ZOO)
def test_a_model_runs_and_its_stacks_are_lists_of_blocks(name: str) -> None:
    one, module = ZOO[name], module_of(name)
    for stack in one.stacks_in(module):
        assert isinstance(module.get_submodule(stack), nn.ModuleList)
    with torch.no_grad():
        found = [module(**one.inputs(2, 5, seed)) for seed in (0, 0, 1)]
        again = module_of(name)(**one.inputs(2, 5, 0))
    same, equal, other, remade = (next(iter(output.values())) for output in (*found, again))
    assert torch.equal(same, equal) and torch.equal(same, remade) and not torch.equal(same, other)
    assert bool(same.isfinite().all())
