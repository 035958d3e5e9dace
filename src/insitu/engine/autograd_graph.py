"""The graph of autograd: new tensors at places, leaves of a loss, and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.autograd_history import steps_of


class _Passing(torch.autograd.Function):
    """Hands a tensor on as another one in the same memory."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        # Not a view: a write in place into a view moves the view to another step of autograd, and
        # its gradient from before the write is lost. It shares the count of writes with the value,
        # so that autograd notices where it has kept what was overwritten.
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient


# Without what `Function.apply` does for `torch.func`, which takes longer than all the rest.
_passed_on: Callable[[torch.Tensor], torch.Tensor] = cast(
    Any, super(torch.autograd.Function, _Passing)
).apply


def passed_on(value: torch.Tensor) -> torch.Tensor:
    """Returns a new tensor in the same memory, through which gradients flow.

    Args:
        value: a tensor that requires a gradient. If it is a leaf, it is one of our own: torch would
            not let a model write into it.
    """
    return _passed_on(value)


def detached(value: torch.Tensor) -> torch.Tensor:
    """Returns a leaf in the same memory, at which the graph of autograd begins."""
    return value.detach().requires_grad_(True)


def origin_of(value: torch.Tensor) -> Any:
    """Returns the step that made a tensor, or the tensor that it is a view of; None for a leaf."""
    base: torch.Tensor | None = value._base
    return value.grad_fn if base is None or base.grad_fn is None else base.grad_fn


def derivatives(
    losses: Sequence[torch.Tensor],
    wanted: Sequence[Any],
    options: Mapping[str, Any],
    goes_on: bool,
) -> list[torch.Tensor | None]:
    """Asks autograd for gradients.

    Args:
        losses: where they start.
        wanted: the tensors, or outputs of steps of autograd, whose gradients are wanted. If there
            are none, the pass runs all the same, for the steps on its way.
        options: what the user gave: `gradient`, `retain_graph` and `create_graph` among it.
        goes_on: whether another pass through the same graph comes after it.

    Returns:
        The gradient of each, None if the losses do not depend on it.
    """
    given = [options.get(name) for name in ("gradient", "retain_graph", "create_graph")]
    keys = [
        id(one) if isinstance(one, torch.Tensor) else (one.node, one.output_nr) for one in wanted
    ]
    places = dict(zip(keys, wanted, strict=True))  # parts of one value are asked for once
    found = cast(Any, torch.autograd.grad)(
        losses,
        [*places.values()] or losses,
        given[0],
        goes_on or given[1],
        bool(given[2]),
        allow_unused=True,
    )
    of_place = dict(zip(places, found, strict=False))
    return [of_place[key] for key in keys]


def is_used_beside(losses: Sequence[torch.Tensor], step: Any, origin: Any) -> bool:
    """Returns whether a tensor is used after another took its place, and not through that one.

    Args:
        losses: what was computed in the end.
        step: the step of autograd that made the other one.
        origin: the step that made the tensor, maybe before views of it.
    """
    since = step._sequence_nr()
    users: dict[Any, Any] = {}
    while step is not origin:
        if len(step.next_functions) != 1:
            return True
        ((below, _),) = step.next_functions
        users[below] = step
        step = below
    return any(
        users.get(before, later) is not later and later._sequence_nr() > since
        for later in steps_of(losses)
        for before, _ in later.next_functions
    )


def is_computed_of(tensors: Sequence[torch.Tensor], step: Any) -> bool:
    """Returns whether tensors were computed of what a step of autograd has made."""
    return any(other is step for other in steps_of(tensors))
