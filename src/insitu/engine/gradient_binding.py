"""Which backward pass a `.grad` belongs to, and which value has to be a new tensor for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from insitu.graph.errors import OperationError
from insitu.graph.expression import expression
from insitu.graph.node import Graph, Site
from insitu.graph.operations import APPLY, ATTRIBUTE, COND, FOLD, GETITEM, GRAD, READ
from insitu.graph.view_operations import is_view

Key = int | str
"""Which entry of a structure."""

Path = tuple[Key, ...]
"""Entries of entries, from the outside in."""

_MADE_ANEW = (APPLY, COND, FOLD)  # what they return is theirs, also if it is what they were given


def bound_to(graph: Graph, grads: Sequence[int], backwards: Sequence[int]) -> dict[int, list[int]]:
    """Returns the nodes that stand for gradients of each backward pass, by its node.

    A gradient belongs to the pass that its line names. Else it belongs to the last one before its
    line, or to the first one after it. Only passes count whose loss can depend on the value: one of
    another invocation does not, unless values go from the one to the other, and none of an earlier
    step of a generation.

    Args:
        graph: the recorded experiment.
        grads: the nodes that stand for gradients.
        backwards: the backward passes.

    Raises:
        OperationError: if there is a gradient and no backward pass.
    """
    bound: dict[int, list[int]] = {index: [] for index in backwards}
    reached: list[tuple[int, _Reached]] = []
    for grad in grads:
        source, *named = graph.rows[grad][3]
        if not backwards:
            raise OperationError(
                f"`{expression(graph, grad)}` is the gradient of a backward pass, and there "
                "is none: write `loss.backward()` in the block.",
                graph[grad].location,
            )
        # `.grad` inside of `with loss.backward():` names its pass.
        if named:
            bound[named[0]].append(grad)
            continue
        possible = backwards
        # With a single pass there is nothing to decide, and following what it reaches takes time.
        if len(backwards) > 1:
            reached = reached or [(index, _reached(graph, index)) for index in backwards]
            base, _ = place_of(graph, source)
            possible = [index for index, found in reached if found.may_hold(graph, source, base)]
            possible = possible or backwards  # the run says that the loss does not depend on it
        # As in PyTorch, `.grad` is what the last backward before this line has left.
        before = [index for index in possible if index < grad]
        bound[before[-1] if before else possible[0]].append(grad)
    return bound


class Backward(NamedTuple):
    """Backward passes of a run that can be run as one.

    Attributes:
        nodes: their nodes, in the order of their lines.
        invocations: those whose runs their losses may depend on.
        joins: whether passes of other invocations could be among them.
    """

    nodes: list[int]
    invocations: set[int]
    joins: bool


def joined(graph: Graph, backwards: Sequence[int]) -> list[Backward]:
    """Returns which backward passes can be run as one, in an order in which they can run.

    Those of invocations that have nothing to do with each other, where none starts with a gradient
    and all ask for the same. Those of one invocation keep their order.

    Args:
        graph: the recorded experiment.
        backwards: the backward passes.
    """
    if len(backwards) < 2:
        return [Backward([index], set(), True) for index in backwards]
    changed = set[int]()  # the invocations in which gradients are changed on their way
    for index in graph.writes:
        if graph.rows[index][0] is GRAD:
            changed.update(_reached(graph, index).steps)
    groups: list[Backward] = []
    asking: list[Any] = []  # what the passes of each group ask for
    for index in backwards:
        found = _reached(graph, index)
        own, asks = {*found.steps}, _asks(graph, index)
        joins = asks is not None and changed.isdisjoint(own)
        first: Backward | None = None  # the first that it can be run with
        for group, asked in zip(reversed(groups), reversed(asking), strict=True):
            # Passes of one invocation depend on each other's order: gradients accumulate.
            if not group.invocations.isdisjoint(own):
                break
            first = group if joins and group.joins and asked == asks else first
        if first is None:
            groups.append(Backward([index], own, joins))
            asking.append(asks)
        else:
            first.nodes.append(index)
            first.invocations.update(own)
    return groups


def _asks(graph: Graph, index: int) -> Any:
    """What passes that run as one ask for alike, None if a pass cannot be one with others."""
    given = dict(graph.rows[index][2])
    if given.pop("inputs", None) or "gradient" in given or given.get("create_graph"):
        return None  # weights and tensors have a gradient of each pass
    named = "inputs" in graph.rows[index][2]
    return named, given, graph.contexts.get(index)


class _Reached(NamedTuple):
    """What a loss may depend on.

    Attributes:
        nodes: the nodes that it is computed of, and those of writes that change the runs behind it.
        steps: the last step of each invocation that it is of.
    """

    nodes: set[int]
    steps: dict[int, int]

    def may_hold(self, graph: Graph, source: int, base: int) -> bool:
        """Whether the loss may depend on a value, or on the site where what it is a view of stands.

        Args:
            graph: the recorded experiment.
            source: the node of the value.
            base: the node that gives what it is a view of.
        """
        operation, args, *_ = graph.rows[graph.original(base)]
        if operation is not READ:
            return source in self.nodes or base in self.nodes
        site = Site(*args)
        return self.steps.get(site.invocation, _NEVER) >= site.step


_NEVER = -2  # before `EVERY`


def _reached(graph: Graph, backward: int) -> _Reached:
    """Finds what the losses of a backward pass may depend on."""
    rows, nodes, steps = graph.rows, set[int](), dict[int, int]()
    given = [
        (Site(*rows[read][1]), made)
        for read, made in (*graph.writes.items(), *graph.skips.items())
        if rows[read][0] is READ
    ]
    pending = {*rows[backward][3]}
    while pending:
        while pending:
            index = pending.pop()
            nodes.add(index)
            operation, args, _, inputs, _, _ = rows[index]
            pending |= {source for source in inputs if source not in nodes}
            if operation is READ:
                site = Site(*args)
                steps[site.invocation] = max(site.step, steps.get(site.invocation, _NEVER))
        # What is written in the runs behind it changes what the loss is made of.
        in_force = {made for site, made in given if steps.get(site.invocation, _NEVER) >= site.step}
        pending = in_force - nodes
    return _Reached(nodes, steps)


def place_of(graph: Graph, source: int) -> tuple[int, Path]:
    """Returns the value that has to be a new tensor for a value to have a gradient of its own.

    That of a view belongs to the value that it is a view of, and that of an entry to the structure.

    Args:
        graph: the recorded experiment.
        source: the node of the value whose gradient is wanted.

    Returns:
        The node, and the entry of its value; if that is a tensor, all of it is meant.
    """
    keys: list[Key] = []
    index = source
    while True:
        operation, args, _, inputs, _, _ = graph.rows[index]
        if index in graph.after:  # it reads what was written there in every step
            index = graph.writes[graph.after[index]]
            continue
        context = graph.contexts.get(index)
        # Up to here it is a view: the gradient of a part is that part of its base's gradient.
        anew = operation in _MADE_ANEW or not inputs or is_view(operation, args) is False
        if anew or operation.short == "detach" or (context is not None and not context.grad):
            return index, tuple(reversed(keys))
        if operation in (GETITEM, ATTRIBUTE) and type(args[1]) in (int, str):
            keys.append(args[1])
        else:
            keys.clear()  # an entry of what a view gives lies somewhere in its base
        index = inputs[0]
