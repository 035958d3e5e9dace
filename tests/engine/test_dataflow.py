"""What a forward makes of what, written down."""

from __future__ import annotations

import torch
from torch import nn

from insitu.engine.dataflow import Dataflow, watch
from insitu.engine.probe import Call


class _Counting(nn.Module):
    """Takes and returns whole numbers beside a tensor."""

    def forward(self, value: torch.Tensor, times: int) -> tuple[torch.Tensor, int]:
        return value * 2, times


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _Counting()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.inner(value.exp(), 0)[0]


def _flow() -> Dataflow:
    module = _Around()
    return watch(module, dict(module.named_modules()), Call((torch.ones(2),), {}), fake=False)


def test_whole_numbers_that_a_module_takes_and_returns_are_no_values() -> None:
    flow = _flow()
    (called,) = flow.calls("inner")
    event = flow.events[called]
    (powers,) = next(one.outputs for one in flow.events if one.function == "exp")
    assert event.inputs == (powers,)
    assert len(event.outputs) == 1
    given = 0  # the first value of all is what the model was called with
    assert all(flow.events[one.event].path != "inner" for one in flow.returned.get(given, ()))
