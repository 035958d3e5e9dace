"""What stands between two values of a forward."""

import torch
from torch import nn

from insitu.engine.dataflow import Dataflow, watch
from insitu.engine.probe import Call
from insitu.models.anatomy.between import between


class Chain(nn.Module):
    """Two layers with a nonlinearity between them, and one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.beside = (nn.Linear(4, 4) for _ in range(3))
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.first(x)).reshape(-1, 4)
        return self.last(hidden.clone()) + self.beside(x).reshape(-1, 4)


def flow() -> Dataflow:
    module = Chain()
    return watch(module, dict(module.named_modules()), Call((torch.ones(1, 2, 4),), {}), True)


def value(found: Dataflow, path: str, output: bool = False) -> int:
    event = found.events[next(found.calls(path))]
    return event.outputs[0] if output else event.inputs[0]


def test_what_changes_numbers_is_listed_and_what_moves_them_is_not() -> None:
    found = flow()
    start, end = value(found, "first", output=True), value(found, "last")
    assert between(found, [start], end) == ["act>gelu"]
    start, end = value(found, "act", output=True), value(found, "last")
    assert between(found, [start], end) == []


def test_what_is_beside_the_way_is_not_listed() -> None:
    found = flow()
    way = between(found, [value(found, "first", output=True)], value(found, "", output=True))
    assert way == ["act>gelu", "last>linear", ">add"]
    way = between(found, [value(found, "first")], value(found, "", output=True))
    assert way == ["first>linear", "act>gelu", "last>linear", "beside>linear", ">add"]


def test_there_may_be_no_way() -> None:
    found = flow()
    start, end = value(found, "beside", output=True), value(found, "last")
    assert between(found, [start], end) is None
    assert between(found, [end], end) == []
