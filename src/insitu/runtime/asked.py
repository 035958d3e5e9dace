"""What each invocation of a block asks of the pass that it runs in.

Invocations that ask the same may share a pass. What one asks changes nothing for the others: they
share a pass of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from insitu.graph.node import Address, Graph
from insitu.graph.operations import BACKWARD, GRAD, KEEP
from insitu.runtime.fallback import Fallback
from insitu.runtime.order import uses
from insitu.runtime.plan import Plan

Cuts = frozenset[tuple[str, Address]]
"""The modules that do not run ("skip") and those after which the run ends ("stop"), as sites of
invocation 0."""


class Asked(NamedTuple):
    """What an invocation asks of its pass.

    Attributes:
        cuts: what of the model does not run.
        differentiates: whether autograd records the pass.
    """

    cuts: Cuts = frozenset()
    differentiates: bool = False

    @property
    def apart(self) -> Fallback | None:
        """Why the invocation shares a pass with no other, None if it may."""
        if self.differentiates:  # of a value that was cut out of a batch its loss does not depend
            return Fallback("gradients are of one prompt at a time")
        if self.cuts:
            return Fallback("what skips or stops is of one prompt at a time")
        return None


NOTHING = Asked()


def asked_by(graph: Graph, plan: Plan, count: int) -> list[Asked]:
    """Returns what each invocation of a block asks.

    Args:
        graph: what is to be done.
        plan: its plan.
        count: how many invocations there are.
    """
    if not (graph.differentiates or plan.skips or plan.stops):
        return [NOTHING] * count
    cuts = [set[tuple[str, Address]]() for _ in range(count)]
    for kind, reads in (("skip", plan.skips), ("stop", plan.stops)):
        for read in reads:
            address = plan.places[plan.bits[read]]
            cuts[address[0]].add((kind, (0, *address[1:])))
    differentiated = _differentiated(graph, plan) if graph.differentiates else ()
    return [Asked(frozenset(cuts[at]), at in differentiated) for at in range(count)]


def _differentiated(graph: Graph, plan: Plan) -> set[int]:
    """The invocations whose values a loss depends on, or of which a gradient is read."""
    needs = 0
    for operation, _, _, inputs, _, _ in graph.rows:
        if operation is BACKWARD or operation is KEEP:
            for source in inputs:
                needs |= plan.needs[source]
        elif operation is GRAD:
            needs |= plan.needs[inputs[0]]
    found = {address[0] for bit, address in plan.places.items() if needs & bit}
    edges = uses(graph, plan, lambda _: None)
    while True:  # what is written into a run of these is of their loss too
        more = {source for source, target in edges if target in found} - found
        if not more:
            return found
        found |= more
