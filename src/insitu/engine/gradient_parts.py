"""Invocations' own parts of a batch's gradients: cut as their values were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from insitu.engine.autograd_graph import is_computed_of
from insitu.graph.structure import map_structure, tensors_of

Followed = tuple[torch.Tensor, Any, int]
"""A value whose gradient is wanted, the step of autograd that made it, and which of its outputs it
is: to autograd, a tensor that is overwritten later is another. A bare tuple takes a fraction of the
time to make."""

Place = torch.Tensor | GradientEdge
"""What autograd is asked for to get a gradient."""


class Parts:
    """The values that are parts of a batch's values.

    To autograd a part is a value of its own, and no loss depends on it through the model. So it is
    asked for the gradient of the whole value, and the invocation gets its part of that.
    """

    def __init__(self) -> None:
        # By identity: the part, where the value of the batch was made, and what cuts the part out.
        self._parts: dict[int, tuple[torch.Tensor, Followed, Callable[[Any], Any]]] = {}

    def note(self, own: Any, whole: Any, cut: Callable[[Any], Any]) -> None:
        """Notes what an invocation's part of a batch's value was cut out of.

        Args:
            own: the part.
            whole: the value, with new tensors where gradients are wanted.
            cut: gives the part of another such value, as of gradients.
        """
        pairs = zip(tensors_of(own), tensors_of(whole), strict=True)
        for number, (part, tensor) in enumerate(pairs):
            if tensor.requires_grad:
                place = tensor, tensor.grad_fn, tensor.output_nr
                self._parts[id(part)] = part, place, partial(_part_of, cut, whole, number)

    def place(self, followed: Sequence[Any]) -> Place:
        """Returns where the gradient of a value is, or of what it is a part of.

        Args:
            followed: the value: a `Followed`.
        """
        value, step, output = followed
        if id(value) in self._parts:
            _, (value, step, output), _ = self._parts[id(value)]
        return value if step is None or value.grad_fn is step else GradientEdge(step, output)

    def own(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor | None,
        place: Place,
        losses: Sequence[torch.Tensor],
    ) -> torch.Tensor | None:
        """Returns an invocation's own gradient; None if its losses do not depend on the value.

        Args:
            value: the value.
            gradient: what autograd gave for it, or for what it is a part of.
            place: what `place` gave for it.
            losses: the invocation's own, among those of the batch.
        """
        if gradient is None or id(value) not in self._parts:
            return gradient
        part = self._parts[id(value)][2](gradient)
        step = place.grad_fn if isinstance(place, torch.Tensor) else place.node
        # Zeros may be a true gradient, or mean that this loss does not depend on the value, which
        # is an error alone.
        if not bool(part.any()) and not is_computed_of(losses, step):  # others' losses may do so
            return None
        return part

    def clear(self) -> None:
        """Drops the tensors of a run."""
        self._parts.clear()


def _part_of(cut: Callable[[Any], Any], whole: Any, number: int, gradient: torch.Tensor) -> Any:
    """An invocation's part of the gradient of one of the tensors of a batch's value."""
    tensor = tensors_of(whole)[number]
    # The gradient of one tensor is cut as a part of the whole structure, since layouts are of
    # structures.
    given = map_structure(lambda item: gradient if item is tensor else item, whole)
    return tensors_of(cut(given))[number]
