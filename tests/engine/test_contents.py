"""What a run on fake tensors knows of the contents of its input."""

import pytest
import torch
from torch import nn

from insitu import Model, UnknownShapeError


class Asking(nn.Module):
    """Goes on by what its ids say, and writes into what it makes of them."""

    def __init__(self, ask: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 3)
        self.ask = ask
        self.register_buffer("limit", torch.tensor(6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        marked = ids > self.limit
        if self.ask == "any":
            return self.head(hidden) if marked.any() else hidden
        if self.ask == "inside":
            return self.head(hidden) if 3 in ids[:, -1] else hidden
        if self.ask == "choose":
            return self.head(hidden[marked])
        if self.ask == "written":
            counts = torch.zeros_like(ids)
            counts[marked] = 2
            counts += 1
            return hidden.repeat(1, int(counts.max()), 1)
        if self.ask == "spoiled":
            marked[:, 0] = hidden[:, 0, 0] > 0
            return self.head(hidden) if marked.any() else hidden
        return self.head(hidden) if hidden.sum() > 0 else hidden


IDS = torch.tensor([[1, 8, 3, 9]])


@pytest.mark.parametrize(
    ("ask", "ids", "shape"),
    [
        ("any", IDS, (1, 4, 3)),
        ("any", IDS.clamp(max=5), (1, 4, 4)),
        ("inside", IDS, (1, 4, 4)),
        ("inside", IDS[:, :3], (1, 3, 3)),
        ("choose", IDS, (2, 3)),
        ("written", IDS, (1, 12, 4)),
        ("written", IDS.clamp(max=5), (1, 4, 4)),
    ],
)
def test_shapes_that_depend_on_ids_are_known(
    ask: str, ids: torch.Tensor, shape: tuple[int, ...]
) -> None:
    model = Model(Asking(ask))
    with model.trace(ids) as tracer:
        told = tracer.output.shape
        output = tracer.output.save()
    assert tuple(told) == shape == tuple(output.value.shape)


@pytest.mark.parametrize("ask", ["spoiled", "weights"])
def test_shapes_that_depend_on_weights_are_not(ask: str) -> None:
    model = Model(Asking(ask))
    with pytest.raises(UnknownShapeError), model.trace(IDS) as tracer:
        print(tracer.output.shape)


def test_buffers_are_as_they_were() -> None:
    model = Model(Asking("written"))
    with model.trace(IDS) as tracer:
        print(tracer.output.shape)
        tracer.output.save()
    assert model.module.limit.item() == 6
