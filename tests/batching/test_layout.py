import pytest
import torch
from torch import nn

from insitu import InsituError
from insitu.batching.layout import Axis, Part, TensorLayout, cut, put, widened
from insitu.batching.proposed_layouts import SIZES, find_layouts
from insitu.engine.probe import Call, probe
from insitu.graph.node import Site

SITE = Site(0, "a", "output")


class Shapes(nn.Module):
    """Returns values whose axes grow with the batch, the length, both or neither."""

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = ids[..., None] * torch.ones(3)
        return {
            "hidden": hidden,
            "pattern": hidden @ hidden.mT,
            "flat": hidden.flatten(0, 1),
            "length first": hidden.transpose(0, 1),
        }


def layouts(module: nn.Module) -> dict:
    found = []
    for batch, length in SIZES:
        call = Call((torch.zeros(batch, length),), {})
        found.append(probe(module, call, {"": module}, {}))
    return dict(find_layouts([single.seen for single in found]))


def test_axes_are_told_apart_by_what_they_grow_with() -> None:
    found = layouts(Shapes())["", "output", 0]
    rows, positions, both, fixed = Axis.ROWS, Axis.POSITIONS, Axis.BOTH, Axis.FIXED
    assert found["hidden"] == TensorLayout((rows, positions, fixed))
    assert found["pattern"] == TensorLayout((rows, positions, positions))
    assert found["flat"] == TensorLayout((both, fixed))
    assert found["length first"] == TensorLayout((positions, rows, fixed))


def test_a_part_is_what_the_module_gives_on_it_alone() -> None:
    module = Shapes()
    whole = torch.arange(24.0).reshape(4, 6)
    layout = layouts(module)["", "output", 0]
    for rows, positions in ((slice(0, 1), slice(0, 4)), (slice(1, 4), slice(2, 6))):
        part = Part(rows, positions, 4, 6)
        mine = cut(SITE, module(whole), layout, part)
        alone = module(whole[rows, positions])
        for name, value in alone.items():
            assert torch.equal(mine[name], value), name


def test_a_part_that_is_put_back_changes_nothing_else() -> None:
    module = Shapes()
    whole = torch.arange(24.0).reshape(4, 6)
    layout = layouts(module)["", "output", 0]
    rows, positions = slice(1, 3), slice(2, 6)
    part = Part(rows, positions, 4, 6)
    value = module(whole)
    put(SITE, value, layout, part, module(whole[rows, positions] * 0 - 1))
    expected = whole.clone()
    expected[rows, positions] = -1
    changed = module(expected)
    for name in ("hidden", "flat", "length first"):
        assert torch.equal(value[name], changed[name]), name
    inside = value["pattern"][rows, positions, positions]
    assert torch.equal(inside, torch.full_like(inside, 3.0))
    inside.copy_(module(whole)["pattern"][rows, positions, positions])
    assert torch.equal(value["pattern"], module(whole)["pattern"])


class Returning(nn.Module):
    def __init__(self, returned) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.returned(x)


@pytest.mark.parametrize(
    "returned",
    [lambda x: x.repeat(2, 1), lambda x: x[:, 1:], lambda x: torch.ones(x.numel(), x.shape[0] - 1)],
    ids=["twice the rows", "one position less", "one row less"],
)
def test_what_cannot_be_cut_has_no_layout(returned) -> None:
    assert ("", "output", 0) not in layouts(Returning(returned))


def test_what_has_no_rows_is_the_same_for_all_of_them() -> None:
    module = Returning(lambda x: (torch.ones(1, x.shape[1], 3), torch.ones(x.shape[1], 3)))
    pair = shared, bare = layouts(module)["", "output", 0]
    assert shared == TensorLayout((Axis.SHARED, Axis.POSITIONS, Axis.FIXED))
    assert bare == TensorLayout((Axis.POSITIONS, Axis.FIXED))
    assert shared.writable
    assert not bare.writable
    value = (torch.randn(1, 6, 3), torch.randn(6, 3))
    part = Part(slice(1, 3), slice(2, 6), 4, 6)
    mine = cut(SITE, value, pair, part)
    assert torch.equal(mine[0], value[0][:, 2:])
    assert torch.equal(mine[1], value[1][2:])


def test_what_rows_share_is_widened_to_be_written() -> None:
    layout = TensorLayout((Axis.SHARED, Axis.POSITIONS))
    value = torch.arange(6.0)[None]
    part = Part(slice(1, 3), slice(2, 6), 4, 6)
    wide = widened(value, layout, 4)
    assert torch.equal(wide, value.repeat(4, 1))
    assert torch.equal(cut(SITE, wide, layout, part), value[:, 2:])
    put(SITE, wide, layout, part, -torch.ones(1, 4))
    expected = value.repeat(4, 1)
    expected[1:3, 2:] = -1
    assert torch.equal(wide, expected)
    assert torch.equal(value[0], torch.arange(6.0))


def test_a_value_of_another_shape_is_refused() -> None:
    layout = TensorLayout((Axis.ROWS, Axis.POSITIONS))
    with pytest.raises(InsituError, match=r"`a.output` \(shapes \(3, 4\)\) cannot be cut"):
        cut(SITE, torch.ones(3, 4), layout, Part(slice(0, 1), slice(0, 4), 2, 4))
