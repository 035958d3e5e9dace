"""What tensors were computed of, as autograd remembers it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


def computed_of(*tensors: torch.Tensor) -> dict[int, torch.Tensor]:
    """Returns the leaves that tensors were computed of, by identity.

    Args:
        tensors: the tensors. A leaf itself was computed of nothing.
    """
    found: dict[int, torch.Tensor] = {}
    for step in steps_of(tensors):
        leaf = getattr(step, "variable", None)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            found[id(leaf)] = leaf
    return found


def steps_of(tensors: Sequence[torch.Tensor]) -> Iterator[Any]:
    """Yields the steps of autograd that tensors were made in, from the last on, each once.

    Args:
        tensors: the tensors.
    """
    seen: set[Any] = set()
    left: list[Any] = [tensor.grad_fn for tensor in tensors]
    while left:
        step = left.pop()
        if step is not None and step not in seen:
            seen.add(step)
            left.extend(before for before, _ in step.next_functions)
            yield step
