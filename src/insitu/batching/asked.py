"""What each invocation of a block asks of the pass that it runs in.

Invocations that ask the same may share a pass. What one asks changes nothing for the others: they
share a pass of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import NamedTuple

from insitu.batching.crossings import uses
from insitu.engine.fallback import Fallback
from insitu.engine.plan import Plan
from insitu.graph.node import Address, Graph
from insitu.graph.operations import BACKWARD, GRAD, KEEP

Cuts = frozenset[tuple[str, Address]]
"""The modules that do not run ("skip") and those after which the run ends ("stop"), as sites of
invocation 0."""


class Asked(NamedTuple):
    """What an invocation asks of its pass.

    Attributes:
        cuts: what of the model does not run.
        differentiates: whether autograd records the pass.
        alone: why the invocation shares its pass with no other, None if it may.
    """

    cuts: Cuts = frozenset()
    differentiates: bool = False
    alone: Fallback | None = None

    @property
    def apart(self) -> Fallback | None:
        """Why the invocation shares no generation with others, None if it may."""
        if self.alone is not None:
            return self.alone
        if self.differentiates:
            return Fallback("gradients of a generation are of one prompt at a time")
        if self.cuts:
            return Fallback("what skips or stops in a generation is of one prompt at a time")
        return None


NOTHING = Asked()
_CHANGED = Fallback("gradients are changed on their way for one prompt at a time")
_KEPT = Fallback("what is saved with its graph is of one prompt at a time")
_OWN = Fallback("its backward pass is not one with those of the others")
_OPAQUE = Fallback("a function of yours may hide what gradients pass, so each prompt has its own")
_TWICE = Fallback("gradients of gradients are of one prompt at a time")


def asked_by(graph: Graph, plan: Plan, count: int) -> list[Asked]:
    """Returns what each invocation of a block asks.

    Args:
        graph: the recorded experiment.
        plan: its plan.
        count: how many invocations there are.
    """
    if not (graph.differentiates or plan.skips or plan.stops):
        return [NOTHING] * count
    cuts = [set[tuple[str, Address]]() for _ in range(count)]
    for kind, reads in (("skip", plan.skips), ("stop", plan.stops)):
        for read in reads:
            address = plan.places[plan.bits[read]]
            # Without the invocation, so that two that cut the same can share a pass.
            cuts[address[0]].add((kind, (0, *address[1:])))
    if plan.gradients is None:
        return [Asked(frozenset(own)) for own in cuts]
    differentiated, alone = _differentiated(graph, plan), _alone(graph, plan)
    if plan.gradients.opaque:
        # Nothing here sees through which values such a function lets gradients pass.
        alone |= dict.fromkeys(differentiated, _OPAQUE)
    return [
        Asked(frozenset(own), number in differentiated, alone.get(number))
        for number, own in enumerate(cuts)
    ]


def _invocations(plan: Plan, nodes: Iterable[int]) -> set[int]:
    """The invocations whose values some nodes depend on."""
    needs = 0
    for node in nodes:
        needs |= plan.needs[node]
    return {address[0] for bit, address in plan.places.items() if needs & bit}


def _alone(graph: Graph, plan: Plan) -> dict[int, Fallback]:
    """The invocations that take gradients which a batch does not give, with the reason."""
    found: dict[int, Fallback] = {}
    for index, (operation, _, kwargs, inputs, _, _) in enumerate(graph.rows):
        why: Fallback | None = None
        # The hook that changes a gradient sees that of the whole batch.
        if operation is GRAD and index in graph.writes:
            why = _CHANGED
        elif operation is KEEP:
            why = _KEPT
        elif operation is BACKWARD and kwargs.get("create_graph"):
            why = _TWICE
        if why is not None:
            found |= dict.fromkeys(_invocations(plan, inputs), why)
    passes = () if plan.gradients is None else plan.gradients.joint
    # A single pass goes through the whole batch anyhow.
    for group in passes if len(passes) > 1 else ():
        if not group.joins and len(group.invocations) == 1:
            (number,) = group.invocations  # it would go through the whole batch for one prompt
            found.setdefault(number, _OWN)
    return found


def _differentiated(graph: Graph, plan: Plan) -> set[int]:
    """The invocations whose values a loss depends on, or whose gradients are read."""
    nodes = [row[3] for row in graph.rows if row[0] in (BACKWARD, GRAD, KEEP)]
    found = _invocations(plan, chain.from_iterable(nodes))
    edges = uses(graph, plan)
    while True:  # what is written into a run of these is of their loss too
        more = {source for source, target in edges if target in found} - found
        if not more:
            return found
        found |= more
