"""What autograd knows of tensors: the steps that made them, their leaves, and what views show.

That changes when something is written into a tensor: to autograd it is then what was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.autograd.graph import GradientEdge

Followed = tuple[torch.Tensor, Any, int, GradientEdge | None]
"""A value whose gradient is wanted; the step of autograd that made it, None for a leaf, and which
of its outputs it is; and where the tensor was made that it is a view of, if it is one. When a value
is written into, it becomes another step's."""


def as_followed(value: torch.Tensor) -> Followed:
    """Returns a value with what made it, as it is now."""
    base: torch.Tensor | None = value._base
    made = None if base is None or base.grad_fn is None else base
    edge = None if made is None else GradientEdge(cast(Any, made.grad_fn), made.output_nr)
    return value, value.grad_fn, value.output_nr, edge


def shows_all(view: torch.Tensor) -> bool:
    """Whether a view shows every entry of its tensor once, and that lies in memory without gaps."""
    base = cast(torch.Tensor, view._base)
    entries = base.untyped_storage().nbytes() // base.element_size()
    return view.numel() == base.numel() == entries and 0 not in view.stride()


def as_view(grad: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of such a view, from that of its tensor."""
    base = cast(torch.Tensor, view._base)
    laid_out = torch.empty_strided(base.shape, base.stride(), dtype=grad.dtype, device=grad.device)
    laid_out.copy_(grad)
    return laid_out.as_strided(view.shape, view.stride(), view.storage_offset())


def is_only_way(loss: Any, view: Any, base: GradientEdge) -> bool:
    """Whether what was made somewhere reaches a loss only through a view of it.

    What is written in place into the view goes that way too.

    Args:
        loss: the loss.
        view: the step of autograd that made the view, maybe of another view.
        base: where that was made which is viewed.
    """
    users: dict[Any, Any] = {}
    step = view
    while step is not base.node:
        if len(step.next_functions) != 1:
            return False
        ((below, _),) = step.next_functions
        users[below] = step
        step = below
    for step in _steps(loss):
        for before, _ in step.next_functions:
            written = before is base.node and step.name().endswith("CopySlices")
            if users.get(before, step) is not step and not written:
                return False
    return True


def key_of(place: torch.Tensor | GradientEdge) -> Any:
    """What tells apart what autograd is asked for."""
    return id(place) if isinstance(place, torch.Tensor) else (id(place.node), place.output_nr)


def computed_of(tensor: torch.Tensor) -> dict[int, torch.Tensor]:
    """Returns the leaves that a tensor was computed of, by identity."""
    found: dict[int, torch.Tensor] = {}
    for step in _steps(tensor):
        leaf = getattr(step, "variable", None)
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            found[id(leaf)] = leaf
    return found


def _steps(tensor: torch.Tensor) -> Iterator[Any]:
    """The steps of autograd that a tensor was made in, from the last on, each once."""
    seen: set[Any] = set()
    left: list[Any] = [tensor.grad_fn]
    while left:
        step = left.pop()
        if step is not None and step not in seen:
            seen.add(step)
            left.extend(before for before, _ in step.next_functions)
            yield step
