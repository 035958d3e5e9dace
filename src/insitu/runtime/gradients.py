"""Gradients: which backward pass a `.grad` belongs to, and what runs in one.

Backward passes run after the forward passes, in the order of their lines. In them gradients
arrive as values do at sites, from the loss towards the inputs, and can be replaced on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from insitu.graph.errors import CausalityError, ExecutionError, OperationError, ShapeError
from insitu.graph.expression import expression
from insitu.graph.node import EVERY, Function, Graph, Ref, Subgraph
from insitu.graph.operations import APPLY, READ
from insitu.graph.structure import map_structure, storages_of
from insitu.runtime.history import (
    Followed,
    as_followed,
    as_view,
    computed_of,
    is_only_way,
    key_of,
    shows_all,
)
from insitu.runtime.plan import Gradients, Plan


def check_gradients(graph: Graph, plan: Plan) -> None:
    """Finds, before the model runs, gradients that cannot be had, and constants that want some.

    Raises:
        OperationError: if one is of every step.
        CausalityError: if the model would have to wait for one.
    """
    assert plan.gradients is not None
    plan.gradients.constants = [at for at in range(len(graph)) if _constants(graph, at)]
    plan.gradients.opaque = any(
        row[0] is APPLY and isinstance(row[1][0], Function) for row in graph.rows
    )
    backwards, bound = list(plan.gradients.bound), plan.gradients.bound
    gradients = sum(plan.bits[grad] for found in bound.values() for grad in found)
    for read, write in (*graph.writes.items(), *graph.skips.items()):
        if graph[read].operation is READ and plan.needs[write] & gradients:
            raise CausalityError(
                f"`{expression(graph, read)}` is given a value that depends on a gradient, and "
                "gradients come when the model has run.",
                graph[write].location,
            )
    for address, index in plan.reads.items():
        if address[4] == EVERY:
            for late in (*backwards, *(grad for found in bound.values() for grad in found)):
                if plan.needs[late] & plan.bits[index] or graph[late].inputs[0] == index:
                    raise OperationError(
                        f"`{expression(graph, late)}` cannot be in `every_step`: take single "
                        "steps.",
                        graph[late].location,
                    )


class Tape:
    """What autograd is asked for in one run.

    Args:
        graph: what is to be done.
        gradients: which gradients belong to which backward pass.
        changed: the nodes that stand for gradients that are written.
        arrive: takes a gradient, given the node that stands for it.
        exchange: takes a gradient on its way, likewise, and returns what goes on in its place.
        model: the wrapped module.

    Attributes:
        followed: the values whose gradients are wanted, by node, as they were before the model has
            gone on.
    """

    def __init__(
        self,
        graph: Graph,
        gradients: Gradients,
        changed: Collection[int],
        arrive: Callable[[int, torch.Tensor], None],
        exchange: Callable[[int, torch.Tensor], torch.Tensor | None],
        model: nn.Module | None,
    ) -> None:
        self._graph = graph
        self._gradients = gradients
        self._changed = changed
        self._arrive = arrive
        self._exchange = exchange
        self._model = nn.Module() if model is None else model
        self._marked: list[torch.Tensor] = []
        self._begins: int | None = None  # the first value that nothing before it gave a gradient
        self.followed: dict[int, Followed] = {}

    def follow(self, index: int, value: Any) -> None:
        """Lets autograd follow a value whose gradient is wanted, if it does not so far.

        Args:
            index: the node that made it.
            value: the value.

        Raises:
            ShapeError: if it is not a tensor of floats.
        """
        if not isinstance(value, torch.Tensor) or not _differentiable(value):
            kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
            grad = self._gradients.wanted[index][0]
            raise ShapeError(
                f"`{expression(self._graph, grad)}` does not exist: only tensors of floats have a "
                f"gradient, and this is {kind}.",
                self._graph[grad].location,
            )
        if not value.requires_grad:
            self._begins = index if self._begins is None else self._begins
            self.mark(value)
        self.followed[index] = as_followed(value)

    def rewritten(self, target: Any) -> None:
        """Notes that a line of the block has written in place: `.grad` is of what was written.

        Args:
            target: what it wrote into, or may have written into.
        """
        memory = storages_of(target)
        for index, (value, *_) in self.followed.items():
            if not memory.isdisjoint(storages_of(value)):
                self.followed[index] = as_followed(value)

    def mark(self, value: Any) -> None:
        """Lets autograd follow all tensors of a value, until the run is over."""

        def leaf(item: Any) -> None:
            if isinstance(item, torch.Tensor) and _differentiable(item) and not item.requires_grad:
                item.requires_grad_(True)
                self._marked.append(item)

        map_structure(leaf, value)

    def explained(self, error: Exception) -> ExecutionError | None:
        """Returns the error to raise for one of the model's, if it comes of what is asked for here.

        Args:
            error: what a forward has raised.
        """
        if self._begins is None or "a leaf Variable that requires grad" not in str(error):
            return None
        grad = self._gradients.wanted[self._begins][0]
        return ExecutionError(
            f"`{expression(self._graph, grad)}` cannot be had: the model writes in place into what "
            "it is the gradient of, or into a part of it, and torch allows that only where "
            "something that comes before requires a gradient. Let parameters of the model require "
            "one, with `model.module.requires_grad_(True)`: they get none.",
            self._graph[grad].location,
        )

    def backward(
        self, index: int, loss: Any, options: dict[str, Any], leaves: Iterable[torch.Tensor]
    ) -> None:
        """Runs a backward pass.

        Args:
            index: its node.
            loss: where it starts.
            options: keyword arguments of `torch.Tensor.backward`.
            leaves: the user's own tensors, which accumulate their gradients.

        Raises:
            ExecutionError: if a gradient is wanted of what the loss does not depend on.
            OperationError: if one cannot be changed.
        """
        grads, whole = self._reached(index, loss)
        own = {id(tensor): tensor for tensor in leaves}
        if self._gradients.opaque:  # a function may use tensors that the graph does not show
            own |= self._leaves_behind(loss)
        if options.get("inputs") is not None:
            given = options.pop("inputs")
            given = [given] if isinstance(given, torch.Tensor) else given
            if any(tensor.is_meta for tensor in given):
                raise ExecutionError(
                    "A tensor of `inputs=` has no data, so the loss does not depend on it: "
                    "Accelerate keeps this weight on the CPU or on disk, and the model computes "
                    "with copies. Load the model without offloading for its gradient.",
                    self._graph[index].location,
                )
            own = {id(tensor): tensor for tensor in given} or own
        wanting: dict[Any, Any] = {key_of(place): place for place in grads.values()} | own
        inputs = list(wanting.values())
        if not inputs and loss.requires_grad:
            raise ExecutionError(
                "Nothing wants a gradient of this backward pass: no `.grad` is used in the block, "
                "and no tensor of yours that requires one. The model's own weights get theirs "
                "where they are named: `loss.backward(inputs=[...])`, of `model.module`.",
                self._graph[index].location,
            )
        outputs = {"grad_outputs": options.pop("gradient", None), "allow_unused": True}
        changed = [grad for grad in grads if grad in self._changed]
        if changed:
            self._check_changes(grads)
        came: set[int] = set()
        handles = [self._listen(*pair, came) for pair in grads.items()] if changed else ()
        try:
            found = torch.autograd.grad(loss, inputs or [loss], **outputs, **options)
        finally:
            for handle in handles:
                handle.remove()
        of_input: dict[Any, Any] = dict(zip(wanting, found, strict=False))
        for key, tensor in own.items():
            grad = of_input[key]
            if grad is not None:
                tensor.grad = grad if tensor.grad is None else tensor.grad + grad
        for grad, place in grads.items():
            value = of_input[key_of(place)]
            if grad in whole and value is not None:
                value = as_view(value, whole[grad])
            if not changed and value is not None:
                self._arrive(grad, value)
            elif grad not in came:
                node = self._graph[grad]
                raise ExecutionError(
                    f"`{expression(self._graph, grad)}` does not exist: the loss does not depend "
                    "on it. The gradient of a part of a site is that part of the site's gradient.",
                    node.location,
                )

    def _leaves_behind(self, loss: Any) -> dict[int, torch.Tensor]:
        """The leaves of a loss that are neither the model's nor values of the run, by identity."""
        found = computed_of(loss)
        for tensor in (*self._model.parameters(), *self._marked):
            found.pop(id(tensor), None)
        return found

    def _reached(
        self, index: int, loss: Any
    ) -> tuple[dict[int, torch.Tensor | GradientEdge], dict[int, torch.Tensor]]:
        """What a backward pass is to give gradients of, as far as the run has come to it.

        To autograd, a tensor that the model has written into since is what was written. What was
        there before has a gradient where it was made. A view, such as a linear layer returns, has
        none there, since what is written goes to the tensor that it shows: of one that shows all
        of it, the gradient is that tensor's.

        Args:
            index: the node of the backward pass.
            loss: where it starts.

        Returns:
            What to ask autograd for, by the nodes that stand for the gradients, and those views.

        Raises:
            ExecutionError: if a gradient cannot be had.
        """
        rows = self._graph.rows
        found: dict[int, torch.Tensor | GradientEdge] = {}
        whole: dict[int, torch.Tensor] = {}
        for grad in self._gradients.bound[index]:
            followed = self.followed.get(rows[grad][3][0])
            if followed is None:  # still to come
                continue
            value, step, output, base = followed
            if step is None or value.grad_fn is step:
                found[grad] = value
            elif value._base is None:
                found[grad] = GradientEdge(step, output)
            elif base is not None and shows_all(value) and is_only_way(loss, step, base):
                found[grad], whole[grad] = base, value
            else:
                raise ExecutionError(
                    f"`{expression(self._graph, grad)}` cannot be had: the model writes in place "
                    "into memory that it uses in other ways too, and torch keeps no gradient of "
                    "this part of it as it was.",
                    self._graph[grad].location,
                )
        return found, whole

    def _check_changes(self, grads: Mapping[int, torch.Tensor | GradientEdge]) -> None:
        """Raises if a gradient is to be changed beside one of what the model has written into."""
        for grad, place in grads.items():
            if isinstance(place, GradientEdge):
                raise OperationError(
                    f"In the backward pass of `{expression(self._graph, grad)}` no gradient can be "
                    "changed: the model writes in place into what this is the gradient of.",
                    self._graph[grad].location,
                )

    def _listen(self, grad: int, tensor: Any, came: set[int]) -> Any:
        """Takes a gradient while the backward pass runs, so that it can be changed.

        Args:
            grad: the node that stands for it.
            tensor: the value that it is the gradient of.
            came: takes the node when the gradient has come.

        Returns:
            The handle of a hook.
        """

        def hook(value: torch.Tensor) -> Any:
            came.add(grad)
            return self._exchange(grad, value)

        return tensor.register_hook(hook)

    def release(self) -> None:
        """Leaves the tensors of the run as they were."""
        for tensor in self._marked:
            if tensor.is_leaf:
                tensor.requires_grad_(False)
        self.followed.clear()
        del self._arrive, self._exchange  # they refer to what refers to this


def leaves_of(
    graph: Graph, gradients: Gradients, requests: object, model: nn.Module
) -> list[torch.Tensor]:
    """Returns the user's own tensors that want a gradient, and none of the model's parameters.

    Of a constant that the user has computed, such as the weight of a parametrised layer, it is
    what it was computed of.

    Args:
        graph: what is to be done, with its constants.
        gradients: which of its nodes may have such tensors.
        requests: what the model is called with.
        model: the wrapped module.
    """
    found: dict[int, torch.Tensor] = {}
    for index in gradients.constants:
        found |= _constants(graph, index)
    _search(requests, found)
    for tensor in [tensor for tensor in found.values() if not tensor.is_leaf]:
        del found[id(tensor)]
        found |= computed_of(tensor)
    if found:
        for parameter in model.parameters():
            found.pop(id(parameter), None)
    return list(found.values())


def _constants(graph: Graph, index: int) -> dict[int, torch.Tensor]:
    """Returns what requires a gradient among the constants of a node, by identity."""
    found: dict[int, torch.Tensor] = {}
    _, args, kwargs, *_ = graph.rows[index]
    for arg in (*args, *kwargs.values()):
        _search(arg, found)
    return found


def _search(value: Any, found: dict[int, torch.Tensor]) -> None:
    """Adds the tensors in a value that require a gradient to what was found, by identity."""
    if type(value) in _NO_LEAVES:
        return
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            found[id(value)] = value
    elif isinstance(value, _SEQUENCES):
        for item in cast("list[Any]", value):
            _search(item, found)
    elif isinstance(value, _MAPPINGS):
        for item in cast("Mapping[Any, Any]", value).values():
            _search(item, found)
    elif isinstance(value, Subgraph):
        for index in range(len(value.graph)):
            found |= _constants(value.graph, index)
        _search(value.output, found)
    elif isinstance(value, Function):
        _search(value.function, found)
    elif isinstance(value, nn.Module):
        for parameter in value.parameters():
            _search(parameter, found)


# Made once; and a dictionary is known for one without a look at the abstract class.
_SEQUENCES, _MAPPINGS = (tuple, list), (dict, Mapping)
_NO_LEAVES = frozenset([Ref, int, float, bool, str, slice, type(None), type(Ellipsis), CodeType])


def _differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
