"""Which writes are possible: a value must be there before the model needs it.

Inside a pass the order is that of the model's modules. Faults are found before the model runs, as
far as the moments of sites are known without a run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cache

from insitu.batching.crossings import Crossing, crossings, earliest, moment, same_place
from insitu.batching.demand import Demand, Work
from insitu.batching.pass_plan import PassPlan
from insitu.engine.order import causality_error
from insitu.graph.errors import CausalityError, InsituError, NeverRanError, OperationError
from insitu.graph.expression import expression
from insitu.graph.location import Location
from insitu.graph.node import SEPARATOR, Address, Site

_NEVER = (math.inf, math.inf)


def circle_error(
    work: Work,
    crossing: Sequence[Crossing],
    circle: Collection[int],
    each: Sequence[Demand],
) -> InsituError:
    """Returns the error for invocations that need each other and cannot share a pass.

    Args:
        work: what the passes are for.
        crossing: which sites others need.
        circle: the invocations.
        each: what all invocations of the block demand.
    """
    graph, plan = work.graph, work.plan
    # What keeps one of the circle apart explains most; otherwise any reason of the block is better
    # than none.
    reasons = [each[number].apart for number in (*sorted(circle), *range(len(each)))]
    apart = next((why for why in reasons if why is not None), None)
    for index, together in plan.repeated.joint if plan.repeated is not None else ():
        if len({each[number].key(number) for number in together}) > 1:
            return OperationError(
                f"`{expression(graph, index)}` uses values of every step of several invocations, "
                "which do not take their steps together here"
                f"{'' if apart is None else f' ({apart.why})'}: read single steps.",
                graph[index].location,
            )
    write = next(
        one.node
        for one in crossing
        if one.target[0] in circle and one.source[0] in circle and one.source[0] != one.target[0]
    )
    why = (
        "with this model and what each of them asks for, such as a gradient, `skip` or `stop`, "
        "they cannot run as one batch"
    )
    if apart is not None and apart.site is not None:
        why = f"what arrives at `{apart.site}` cannot be cut out of a batch"
    elif apart is not None:
        why = f"they cannot run as one batch ({apart.why})"
    return CausalityError(
        f"Invocations of this block need values of each other, but {why}, so one of them "
        "would have to run first.",
        graph[write].location,
    )


def check_order(work: Work, passes: Sequence[PassPlan]) -> None:
    """Finds writes that need what comes later in the same pass.

    Args:
        work: what the passes are for.
        passes: the passes.

    Raises:
        CausalityError: if there is one.
    """
    graph, plan = work.graph, work.plan
    found = crossings(graph, plan)
    if not found:
        return
    home = {at: number for number, single in enumerate(passes) for at in single.reads}
    moments = cache(work.moments)
    late: dict[tuple[Address, int], set[int]] = {}
    for source, target, node in found:
        # Of another pass it is there before; at the same place the write uses what has just
        # arrived.
        if home[source] != home[target] or same_place(source, target):
            continue
        order = moments(target[0])
        own = moment(target, order)
        # A source whose moment is not known counts as too late only if the target's is known. What
        # is inside of a forward that has begun by then, the run itself looks at.
        if own is not None and (earliest(source, order) or _NEVER) > own:
            late.setdefault((target, node), set()).add(plan.reads[source])
    if late:
        (target, node), reads = next(iter(late.items()))
        raise causality_error(graph, plan.reads[target], node, reads)


def check_cuts(work: Work) -> None:
    """Finds reads of sites that are skipped or come after the end of the run.

    Args:
        work: what the passes are for.

    Raises:
        NeverRanError: if there is one.
    """
    graph, plan = work.graph, work.plan
    for read in plan.skips:
        skipped = Site(*plan.places[plan.bits[read]])
        for address, index in plan.reads.items():
            inside = (
                address[1].startswith((f"{skipped.path}.", f"{skipped.path}{SEPARATOR}"))
                and address[4] == skipped.step
            )
            if inside and address[0] == skipped.invocation:
                raise NeverRanError(
                    f"`{Site(*address)}` has no value, because `skip` lets `{skipped.owner}` not "
                    f"run, at\n{graph[plan.skips[read]].location}\nIt is used at",
                    graph[index].location,
                )
    for read, mark in plan.stops.items():
        last = Site(*plan.places[plan.bits[read]])
        moments = work.moments(last.invocation)
        end = moment(last, moments)
        for address, index in plan.reads.items():
            comes = earliest(address, moments)
            if address[0] == last.invocation and end and comes and comes > end:
                raise NeverRanError(
                    f"`{Site(*address)}` has no value, because the run ends after "
                    f"`{last.owner}`, by `stop` at\n{Location(*mark)}\nIt is used at",
                    graph[index].location,
                )
