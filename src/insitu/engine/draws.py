"""Random numbers that lines draw: which lines do, and from which invocation's seed.

Without a seed they come from PyTorch's generators, as in a hook. With one, the lines of an
invocation draw what they would draw alone after `torch.manual_seed(seed)`, with any others in its
pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from insitu.graph.node import Row
from insitu.graph.operations import APPLY, COND, FOLD, PULL_BACK, PUT, RANDOM
from insitu.graph.structure import tensors_of

_ATTENTION = {
    "functional.scaled_dot_product_attention": (4, 0.0),
    "functional.multi_head_attention_forward": (10, 0.0),
}
"""Operations that drop attention out: at which place they take the chance, and its default."""


_SELDOM = {APPLY.name, PULL_BACK.name, COND.name, FOLD.name, PUT.name, *_ATTENTION}


def drawing_nodes(rows: Sequence[Row]) -> list[int]:
    """Returns the nodes that may draw random numbers.

    Args:
        rows: the nodes of a graph.
    """
    return [
        index
        for index, row in enumerate(rows)
        if row[0].name in RANDOM or (row[0].name in _SELDOM and _draws(row))
    ]


def _draws(row: Row) -> bool:
    """Whether one draws that does not always do so."""
    operation, args, kwargs, *_ = row
    if operation is PUT:
        return args[2] in RANDOM
    if operation.name in _ATTENTION:
        place, default = _ATTENTION[operation.name]
        chance = args[place] if len(args) > place else kwargs.get("dropout_p", default)
        return not (isinstance(chance, int | float) and chance == 0)
    return True  # what it calls may


class Draws:
    """The random states of the invocations of a run that have seeds.

    Args:
        seeds: the seeds, by the numbers of the invocations.
    """

    def __init__(self, seeds: Mapping[int, int]) -> None:
        self._seeds = seeds
        self._states: dict[tuple[int, torch.device], torch.Tensor] = {}

    def rows(self, drawing: Mapping[int, Collection[int]], rows: Sequence[Row]) -> list[Row]:
        """Returns the nodes anew, so that those that draw do so from the seeds.

        One that is made of several invocations draws from the first of them that has a seed.

        Args:
            drawing: the nodes that may draw, each with the invocations that it is made of.
            rows: the nodes of the graph, as they are to run.
        """
        found = [*rows]
        for index, invocations in drawing.items():
            seeded = [number for number in sorted(invocations) if number in self._seeds]
            if seeded:
                operation, *rest = found[index]
                function = self._from_seed(seeded[0], operation.function)
                found[index] = cast(Row, (replace(operation, function=function), *rest))
        return found

    def _from_seed(self, number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that draws from the random state of an invocation."""

        def called(*args: Any, **kwargs: Any) -> Any:
            there = {tensor.device for tensor in tensors_of((args, kwargs))}
            devices = [torch.device("cpu"), *(one for one in there if one.type == "cuda")]
            before = [_state(device) for device in devices]
            try:
                for device in devices:
                    _set_state(device, self._state(number, device))
                return function(*args, **kwargs)
            finally:
                for device, state in zip(devices, before, strict=True):
                    self._states[number, device] = _state(device)
                    _set_state(device, state)

        return called

    def _state(self, number: int, device: torch.device) -> torch.Tensor:
        state = self._states.get((number, device))
        if state is None:
            state = torch.Generator(device).manual_seed(self._seeds[number]).get_state()
        return state


def _state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
