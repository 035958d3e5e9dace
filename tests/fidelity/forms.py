"""Forms of writes: as one would write them with Insitu, and what that is in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.fidelity.alone import (
    VECTORS,
    Change,
    first,
)


def in_place(block: Any, position: int) -> None:
    block.output[0][:, position] = VECTORS[position]


def from_there_on(block: Any, position: int) -> None:
    block.output[0][:, position:] += VECTORS[0]


def a_view_of_it(block: Any, position: int) -> None:
    block.output[0][:, position:][..., :5].mul_(3)


def in_a_copy(block: Any, position: int) -> None:
    hidden = block.output[0].clone()
    hidden[:, position] = VECTORS[position]
    block.output = hidden


def in_a_copy_of_a_copy(block: Any, position: int) -> None:
    hidden = block.output[0].clone().clone()
    hidden[0, position:] = VECTORS[position]
    block.output[0] = hidden


def functional(block: Any, position: int) -> None:
    block.output = block.output[0] * 2


def whole_part(block: Any, position: int) -> None:
    block.output[0] = block.output[0] + VECTORS[position]


def whole_tuple(block: Any, position: int) -> None:
    block.output = (block.output[0] - 1,)


def with_a_mask(block: Any, position: int) -> None:
    hidden = block.output[0]
    hidden[hidden > 0.5] = 0.5


def of_an_early_position(block: Any, position: int) -> None:
    block.output[0][:, position] = block.output[0][:, 0] * 3


def and_an_early_one(block: Any, position: int) -> None:
    block.output[0][:, position] = 0
    block.output[0][:, 1] = 0


def a_list_of_positions(block: Any, position: int) -> None:
    block.output[0][:, [2, position]] = 1.5


def twice(block: Any, position: int) -> None:
    block.output[0][:, position] += 1
    block.output = block.output[0] * 0.5


def to_itself(block: Any, position: int) -> None:
    block.output = block.output[0]


FORMS = [
    in_place,
    from_there_on,
    a_view_of_it,
    in_a_copy,
    in_a_copy_of_a_copy,
    functional,
    whole_part,
    whole_tuple,
    with_a_mask,
    of_an_early_position,
    and_an_early_one,
    a_list_of_positions,
    twice,
    to_itself,
]


class Block:
    """Stands for a block's handle where the same lines are to run on plain tensors."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self._output = [hidden]

    @property
    def output(self) -> list[torch.Tensor]:
        return self._output

    @output.setter
    def output(self, value: Any) -> None:
        self._output = [first(value)]


def in_torch(form: Callable[[Any, int], None], position: int) -> Change:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        block = Block(hidden)
        form(block, position)
        return block.output[0]

    return change
