"""Gradients: where autograd is asked for them in a run, and what runs in a backward pass.

Backward passes run after the forward passes, in the order of their lines. In them gradients
arrive as values do at sites, from the loss towards the inputs, and can be replaced on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from insitu.engine.autograd_graph import (
    derivatives,
    detached,
    is_used_beside,
    origin_of,
    passed_on,
)
from insitu.engine.gradient_binding import Key, Path
from insitu.engine.gradient_parts import Followed, Parts
from insitu.engine.plan import Gradients
from insitu.graph.autograd_history import computed_of
from insitu.graph.errors import ExecutionError, ShapeError
from insitu.graph.expression import expression
from insitu.graph.node import Graph
from insitu.graph.operations import GRAD
from insitu.graph.structure import map_structure, storages_of
from insitu.graph.writing import replaced

_Made = tuple[torch.Tensor, Any, Any, int, int]
"""A new tensor in the place of another, and the step that made it. Then the step that made the
other, or the tensor that the other is a view of; None if autograd begins there. Then how often
their memory was written into before, and a node that stands for its gradient."""

_FIRST = (0,)


class Tape:
    """What autograd is asked for in one run.

    A value whose gradient is wanted is made a new tensor where it is computed, or where it arrives.
    The lines of the block and the model go on with that one, so its gradient is of what passes
    there, and of nothing else that has the same memory.

    Args:
        graph: the recorded experiment.
        gradients: which gradients belong to which backward pass.
        changed: the nodes that are written, among them those that stand for gradients.
        arrive: takes a gradient, given the node that stands for it.
        exchange: takes a gradient on its way, given the same node, and returns what goes on in its
            place.
        model: the wrapped module.

    Attributes:
        done: the nodes that have run, or whose site's value has arrived.
        losses: the losses that stand at a site, or are views of what does, by their nodes.
        parts: the values that are parts of a batch's.
        is_batched: whether invocations have shared a pass that autograd has recorded.
    """

    is_batched = False

    def __init__(
        self,
        graph: Graph,
        gradients: Gradients,
        changed: Collection[int],
        arrive: Callable[[int, Any], None],
        exchange: Callable[[int, torch.Tensor], torch.Tensor | None],
        model: nn.Module | None,
    ) -> None:
        self._graph = graph
        self._gradients = gradients
        self._changed = {index for index in changed if graph.rows[index][0] is GRAD}
        self._arrive = arrive
        self._exchange = exchange
        self._model = nn.Module() if model is None else model
        self.losses: dict[int, torch.Tensor | None] = dict.fromkeys(gradients.losses)
        self._followed: dict[int, Followed] = {}
        self._made: list[_Made] = []
        self.parts = Parts()
        self.done: set[int] = set()
        # A view takes 6 µs less than what autograd takes for no view, but nobody may write into it.
        self._views = gradients.overwritten is False
        self._leaves: list[torch.Tensor] = []  # where autograd begins in a frozen model
        self._listening: Sequence[int] = ()  # the gradients of the running pass, if some change
        self._came: set[int] = set()
        # The user's own tensors with the gradients that they had before each that was added.
        self._accumulated: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def renewed(self, index: int, value: Any, done: set[Path] | None = None) -> Any:
        """Returns a value with new tensors in the places whose gradients are wanted.

        Args:
            index: its node.
            value: what was computed, or has arrived.
            done: the places in it that were made new for other invocations; more are added.
        """
        for path, grad in self._gradients.renewed[index].items():
            if done is not None:
                if path in done:
                    continue
                done.add(path)
            if type(value) is torch.Tensor:
                value = self._new(grad, value)
            elif path == _FIRST and type(value) is tuple:  # of a block: without `_with_new`
                first, *others = cast("tuple[Any, ...]", value)
                value = (self._new(grad, first), *others)
            else:
                value = _with_new(value, path, partial(self._new, grad))
        return value

    def _new(self, grad: int, value: Any) -> Any:
        """Returns a new tensor in the memory of another, through which gradients flow."""
        if not isinstance(value, torch.Tensor) or not _differentiable(value):
            return value
        if not value.requires_grad:
            value, origin = detached(value), None
            self._leaves.append(value)
        elif value.is_leaf or self._views:  # into a tensor of the user's torch lets nobody write
            value = value.view_as(value)
            self._made.append((value, value.grad_fn, None, 0, grad))
            return value
        else:
            origin = origin_of(value)
        made = passed_on(value)
        self._made.append((made, made.grad_fn, origin, made._version, grad))
        return made

    def note(self, index: int, value: Any) -> Any:
        """Notes what was computed, or has arrived, and returns it with what its gradient takes.

        Args:
            index: its node.
            value: the value.
        """
        self.done.add(index)
        if index in self._gradients.wanted:
            value = self._follow(index, value)
        if index in self.losses:
            self._begin_at(index, value)
        return value

    def _follow(self, index: int, value: Any) -> Any:
        """Notes where a value was made whose gradient is wanted.

        Args:
            index: its node.
            value: the value.

        Returns:
            The value, which requires a gradient.

        Raises:
            ShapeError: if it is not a tensor of floats.
        """
        if type(value) is torch.Tensor and value.requires_grad:  # nearly always
            self._followed[index] = value, value.grad_fn, value.output_nr
            if not self._changed:
                return value
        elif not isinstance(value, torch.Tensor) or not _differentiable(value):
            kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            grad = self._gradients.wanted[index][0]
            raise ShapeError(
                f"`{expression(self._graph, grad)}` does not exist: only tensors of floats have a "
                f"gradient, and this is {kind}.",
                self._graph[grad].location,
            )
        if not value.requires_grad:  # a part of a value under `torch.no_grad()`
            value = detached(value)
            self._leaves.append(value)
        self._followed[index] = value, value.grad_fn, value.output_nr
        if self._changed:
            cast(Any, value).register_hook(partial(self._on_its_way, index))
        return value

    def _begin_at(self, index: int, value: Any) -> None:
        """Notes a loss as it is now: the model may write into it later.

        Args:
            index: its node.
            value: the loss.
        """
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            self.losses[index] = passed_on(value)

    def rewritten(self, target: Any) -> None:
        """Notes that a function of the user's may have written in place: `.grad` is of the result.

        Args:
            target: what it may have written into.
        """
        memory = storages_of(target)
        for index, (value, step, _) in self._followed.items():
            # What nobody has written into is made by the same step, which is known in no time.
            if value.grad_fn is not step and not memory.isdisjoint(storages_of(value)):
                self._followed[index] = value, value.grad_fn, value.output_nr

    def backward(
        self,
        starts: Mapping[int, Sequence[torch.Tensor]],
        options: Mapping[str, Any],
        leaves: Iterable[torch.Tensor],
        goes_on: bool = False,
    ) -> tuple[Any, ...]:
        """Runs a backward pass, or several of invocations that have nothing to do with each other.

        Args:
            starts: where it starts, by its node.
            options: what the nodes are given by keyword.
            leaves: the user's own tensors, which accumulate their gradients.
            goes_on: whether other invocations have passes of the same batch after it.

        Returns:
            The gradients of what its `inputs` name, None for what the losses do not depend on.

        Raises:
            ExecutionError: if a gradient is wanted of what the losses do not depend on.
        """
        began = {index: self._as_noted(index, own) for index, own in starts.items()}
        losses = [loss for own in began.values() for loss in own]
        self._check_overwritten(losses)
        values = {
            grad: (index, *self._followed[source])
            for index in began
            for grad in self._gradients.bound[index]
            if (source := self._graph.rows[grad][3][0]) in self._followed  # else still to come
        }
        named: Sequence[torch.Tensor] | None = options.get("inputs")
        if named is None:
            own = self._accumulating(losses, leaves)
        else:
            self._check_named(next(iter(starts)), named)
            own = [*named]
        for index in began if not own else ():
            if index not in {of for of, *_ in values.values()} and all(
                loss.requires_grad for loss in began[index]
            ):
                raise ExecutionError(
                    "Nothing wants a gradient of this backward pass: no `.grad` is used in the "
                    "block, and no tensor of yours that requires one. Name weights of the model "
                    "whose gradients you want: `grads = loss.backward(inputs=[...])`.",
                    self._graph[index].location,
                )
        changes = not self._changed.isdisjoint(values)
        self._listening, self._came = [*values] if changes else (), set()
        places = [self.parts.place(followed) for _, *followed in values.values()]
        try:
            found = derivatives(losses, [*places, *own], options, goes_on)
        finally:
            self._listening = ()
        for number, (of, value, *_) in enumerate(values.values()):
            found[number] = self.parts.own(value, found[number], places[number], began[of])
        lenient = options.get("allow_unused", False)
        if options.get("materialize_grads", False):
            lenient = True
            of_each = [*(value for _, value, *_ in values.values()), *own]
            pairs = zip(found, of_each, strict=True)
            found = [torch.zeros_like(one) if grad is None else grad for grad, one in pairs]
        for grad, value in zip(values, found, strict=False):
            if not changes and (value is not None or lenient):
                self._arrive(grad, value)
            elif grad not in self._came:
                raise ExecutionError(
                    f"`{expression(self._graph, grad)}` does not exist: the loss does not depend "
                    "on it. The gradient of a part of a site is that part of the site's gradient.",
                    self._graph[grad].location,
                )
        of_own = found[len(values) :]
        if options.get("accumulate", True):
            self._accumulate(own, of_own)
            return tuple(of_own)
        unused = [number for number, grad in enumerate(of_own) if grad is None]
        if unused and not lenient:
            raise ExecutionError(
                f"The loss does not depend on weight number {unused[0]} of those whose gradients "
                "are asked for: give `allow_unused=True` to get None for it.",
                self._graph[next(iter(starts))].location,
            )
        return tuple(of_own)

    def _as_noted(self, index: int, losses: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The losses of a backward pass, as they were before the model may have written there."""
        noted = [self.losses.get(arg.index) for arg in self._graph.rows[index][1]]
        return [own if now is None else now for now, own in zip(noted, losses, strict=True)]

    def _check_overwritten(self, losses: Sequence[torch.Tensor]) -> None:
        """Raises if the model has overwritten what autograd takes for something else.

        A new tensor is in the memory of the one that it stands for. Where the model writes into it,
        autograd does not know that the other one has changed too.
        """
        overwritten = False
        for tensor, step, origin, version, grad in self._made:
            changed = tensor.grad_fn is not step
            overwritten = overwritten or changed or tensor._version > version
            if changed and self._views:
                self._gradients.overwritten = True
                raise ExecutionError(
                    f"`{expression(self._graph, grad)}` cannot be had in this run: the model "
                    "writes into it in place, as it did not in the runs before. Run the block "
                    "once more.",
                    self._graph[grad].location,
                )
            if changed and origin is not None and is_used_beside(losses, step, origin):
                raise ExecutionError(
                    f"`{expression(self._graph, grad)}` cannot be had: the model writes into it in "
                    "place, and then uses the same memory by another name.",
                    self._graph[grad].location,
                )
        if self._gradients.overwritten is None:
            self._gradients.overwritten = overwritten

    def _accumulating(
        self, losses: Sequence[torch.Tensor], leaves: Iterable[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The user's own tensors that a backward pass accumulates gradients in."""
        own = {id(tensor): tensor for tensor in leaves}
        if self._gradients.opaque:  # a function may use tensors that the graph does not show
            found = computed_of(*losses)
            for tensor in (*self._model.parameters(), *self._leaves):
                found.pop(id(tensor), None)
            own |= found
        return [*own.values()]

    def _check_named(self, index: int, named: Sequence[torch.Tensor]) -> None:
        """Raises if a tensor of `inputs=` cannot have a gradient."""
        location = self._graph[index].location
        if any(tensor.is_meta for tensor in named):
            raise ExecutionError(
                "A tensor of `inputs=` has no data, so the loss does not depend on it: "
                "Accelerate keeps this weight on the CPU or on disk, and the model computes "
                "with copies. Load the model without offloading for its gradient.",
                location,
            )
        if not all(tensor.requires_grad for tensor in named):
            raise ExecutionError(
                "A tensor of `inputs=` does not require a gradient, so autograd keeps none for it: "
                "call `.requires_grad_()` of it before the block.",
                location,
            )

    def _accumulate(self, tensors: Sequence[torch.Tensor], grads: Sequence[Any]) -> None:
        """Adds gradients to those of the user's own tensors, and to none of the model's."""
        models = {id(parameter) for parameter in self._model.parameters()} if tensors else ()
        for tensor, grad in zip(tensors, grads, strict=True):
            if grad is not None and id(tensor) not in models:
                self._accumulated.append((tensor, tensor.grad))
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad

    def take_back(self) -> None:
        """Gives the user's own tensors the gradients that they had before the run."""
        while self._accumulated:
            tensor, grad = self._accumulated.pop()
            tensor.grad = grad

    def _on_its_way(self, index: int, value: torch.Tensor) -> torch.Tensor:
        """Takes the gradient of a followed value while a pass runs, and returns what goes on."""
        for grad in self._listening:
            if self._graph.rows[grad][3][0] == index:
                self._came.add(grad)
                written = self._exchange(grad, value)
                value = value if written is None else written
        return value

    def release(self) -> None:
        """Drops the tensors of the run."""
        self._followed.clear()
        self.parts.clear()
        self._made.clear()
        self.losses.clear()
        del self._arrive, self._exchange  # they refer to what refers to this


def _with_new(value: Any, path: Sequence[Key], new: Callable[[Any], Any]) -> Any:
    """Returns a value with the tensors at a path replaced: its entries' entries, or all of it."""
    if type(value) is torch.Tensor:
        return new(value)
    if not path:
        return map_structure(new, value)
    key, *rest = path
    try:
        entry = value[key] if not isinstance(key, str) else _named_entry(value, key)
    except (KeyError, IndexError, AttributeError, TypeError):  # of which its own node tells
        return value
    made = _with_new(entry, rest, new)
    return value if made is entry else replaced(value, key, made)


def _named_entry(value: Any, name: str) -> Any:
    return cast(Any, value)[name] if isinstance(value, Mapping) else getattr(value, name)


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
