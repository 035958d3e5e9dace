"""What runs without data leave of the objects, lists and dictionaries that they are given."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from insitu import Model


class State:
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = [torch.ones(1, 4)]


class Filling(nn.Module):
    """Fills what it is given, and returns a sum over all that is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = given.seen if isinstance(given, State) else given
        seen.append(self.linear(x))
        return torch.cat(seen)


def test_a_shape_leaves_an_object_that_the_forward_fills() -> None:
    state, model = State(), Model(Filling())
    for length in (2, 3, 4):
        with model.trace(torch.ones(1, 4), state):
            assert model.output.shape == (length, 4)
            output = model.output.save()
        assert output.shape == (length, 4)  # the run fills it, as a call of the module does
        assert not any(isinstance(tensor, FakeTensor) for tensor in state.seen)


def test_lists_are_inputs_of_each_run() -> None:
    given, model = [torch.ones(1, 4)], Model(Filling())
    with model.trace() as tracer:
        for _ in range(2):
            with tracer.invoke(torch.ones(1, 4), given):
                assert model.output.shape == (2, 4)
                output = model.output.save()
    assert output.shape == (2, 4) and len(given) == 1
    with model.trace(torch.ones(1, 4), given) as tracer:
        model.output.save("output")
    for _ in range(2):
        assert model.run(tracer.job)["output"].shape == (2, 4)


class Grouping(nn.Module):
    """Adds to a group that may not be there yet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, groups: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
        groups["new"].append(self.linear(groups["old"][0]))
        return groups


def test_a_dictionary_with_defaults_keeps_them() -> None:
    given, model = defaultdict(list, old=[torch.ones(1, 4)]), Model(Grouping())
    with model.trace(given):
        assert model.output["new"][0].shape == (1, 4)
        output = model.output.save()
    expected = model.module.linear(torch.ones(1, 4))
    torch.testing.assert_close(output.value["new"], [expected])
    assert given.keys() == {"old"}
