"""Which invocations use values of others, and whether those are there in time in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from insitu.engine.plan import Plan
from insitu.graph.node import SEPARATOR, Address, Graph, Kind, Place
from insitu.graph.operations import READ

Moments = Callable[[int], "Mapping[Place, int] | None"]
"""When the sites of an invocation come, or None if that is not known without a run."""


class Crossing(NamedTuple):
    """A site that another one needs.

    Attributes:
        source: the site that is needed.
        target: the site that is written, or the arguments of the call that is skipped.
        node: the node that makes the value which is put there.
    """

    source: Address
    target: Address
    node: int


def crossings(graph: Graph, plan: Plan) -> list[Crossing]:
    """Returns the sites that others need, in the same invocation or in another.

    Args:
        graph: the recorded experiment.
        plan: its plan.
    """
    if not plan.crosses and not plan.skips:
        return []
    found: list[Crossing] = []
    for read, node in (*plan.writes.items(), *plan.skips.items()):
        operation, target, *_ = graph.rows[read]
        if operation is not READ:
            continue  # a gradient: its order is that of the backward pass
        # What arrives at the written site itself is there, by definition.
        mask = plan.needs[node] & ~plan.bits[read]
        while mask:
            # The lowest bit: sites are taken out one by one.
            bit = mask & -mask
            mask ^= bit
            if bit in plan.places:
                found.append(Crossing(plan.places[bit], target, node))
    return found


def in_time(crossing: Crossing, moments: Moments) -> bool:
    """Returns whether one pass would do for both sites, as far as is known.

    Args:
        crossing: the sites.
        moments: when sites come.
    """
    source, target, _ = crossing
    if same_place(source, target):
        return True
    # For a function the module around it bounds the moment: it cannot come before the module is
    # called.
    here = earliest(target, moments(target[0]))
    there = moment(bounding(source, "output"), moments(source[0]))
    # Where nothing is known one pass is tried: the run refuses what comes too late, at its line.
    return here is None or there is None or there <= here


def uses(graph: Graph, plan: Plan) -> list[tuple[int, int]]:
    """Returns which invocations are used by which others, as pairs, the used one first.

    Args:
        graph: the recorded experiment.
        plan: its plan.
    """
    pairs = [(one.source[0], one.target[0]) for one in crossings(graph, plan)]
    found = [*steps_together(plan), *(pair for pair in pairs if pair[0] != pair[1])]
    return list(dict.fromkeys(found))


def steps_together(plan: Plan) -> list[tuple[int, int]]:
    """Returns the pairs of invocations that take their steps together, both ways round.

    Args:
        plan: the plan of the graph.
    """
    joint = () if plan.repeated is None else plan.repeated.joint
    return [(one, other) for _, own in joint for one in own for other in own if one != other]


def same_place(one: Address, other: Address) -> bool:
    """Returns whether two sites are one place, or both what a module is called with."""
    arguments = ("input", "inputs")
    same_kind = one[2] == other[2] or (one[2] in arguments and other[2] in arguments)
    return same_kind and one[1] == other[1] and one[3:] == other[3:]


def moment(address: Address, moments: Mapping[Place, int] | None) -> tuple[float, float] | None:
    """Returns when a site comes: its step, and its place in the step; None if that is not known.

    Args:
        address: the site.
        moments: when places come in a step.
    """
    _, path, kind, call, step = address
    # Tokens are chosen when the forward of their step has ended.
    within = {"choice": math.inf, "tokens": math.inf}.get(kind)
    if within is None and moments is not None:
        within = moments.get((path, kind, call))
    if within is None:
        return None
    # What is read in every step is there in the first.
    return (max(step, 0) + (kind == "tokens") / 2, within)


def earliest(address: Address, moments: Mapping[Place, int] | None) -> tuple[float, float] | None:
    """Returns when a site may come first, None if that is not known.

    Args:
        address: the site. A function in a module's forward comes once the module is called.
        moments: when places come in a step.
    """
    return moment(bounding(address, "inputs"), moments)


def bounding(address: Address, bound: Kind) -> Address:
    """Returns a site; of a function in a module's forward, what bounds its moment.

    Args:
        address: the site.
        bound: which value of the module stands for the functions inside of its forward.
    """
    owner, inside, _ = address[1].partition(SEPARATOR)
    return (address[0], owner, bound, 0, address[4]) if inside else address
