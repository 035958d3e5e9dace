"""Which writes are possible: a value must be there before the model needs it.

Inside a pass the order is that of the model's modules. Passes that run apart are put into the
order in which they need values of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from insitu.graph.errors import CausalityError
from insitu.graph.node import Address, Graph, Site
from insitu.runtime.plan import Plan

if TYPE_CHECKING:
    from insitu.runtime.passes import Pass, Place


def pass_order(graph: Graph, plan: Plan, passes: Sequence[Pass]) -> list[int]:
    """Returns the numbers of passes, each after those whose values its writes need.

    Raises:
        CausalityError: if two of them need each other's.
    """
    home = {number: at for at, single in enumerate(passes) for number in single.cuts}
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(len(passes)), ()))
    for read, write in plan.writes.items():
        target = _address(graph, read)
        for other in _needed(plan, read, write):
            if home[other[0]] != home[target[0]]:
                sorter.add(home[target[0]], home[other[0]])
    try:
        return list(sorter.static_order())
    except CycleError as error:
        cycle = set(error.args[1])
        write = next(w for r, w in plan.writes.items() if home[_address(graph, r)[0]] in cycle)
        raise CausalityError(
            "Invocations of this block need values of each other, but with this model and these "
            "options they cannot run as one batch, so one of them would have to run first.",
            graph[write].location,
        ) from None


def check_order(
    graph: Graph,
    plan: Plan,
    passes: Sequence[Pass],
    order: Callable[[int], Mapping[Place, int] | None],
) -> None:
    """Finds, before the model runs, writes that need what comes later in the same pass.

    Args:
        graph: what is to be done.
        plan: its plan.
        passes: the passes that it runs in.
        order: gives the moments at which the sites of an invocation come, or None if they are not
            known without a run. Then the pass itself finds out.

    Raises:
        CausalityError: if there is one.
    """
    dependent = [(r, w) for r, w in plan.writes.items() if plan.needs[w] != plan.bits[r]]
    if not dependent:  # what is written was made of what arrived there: nothing to look up
        return
    home = {number: at for at, single in enumerate(passes) for number in single.cuts}
    for read, write in dependent:
        target = _address(graph, read)
        others = [
            other
            for other in _needed(plan, read, write)
            if home[other[0]] == home[target[0]] and other[1:] != target[1:]
        ]
        moments = order(target[0]) if others else None
        if moments is None or target[1:] not in moments:
            continue
        last = len(moments)
        late = {other for other in others if moments.get(other[1:], last) > moments[target[1:]]}
        if late:
            raise causality_error(graph, plan, read, late)


def causality_error(
    graph: Graph, plan: Plan, read: int, late: Collection[Address]
) -> CausalityError:
    """Returns the error for a write that needs what comes after it.

    Args:
        graph: what is to be done.
        plan: its plan.
        read: the node that reads the site that is written.
        late: the sites that come too late.
    """
    write = plan.writes[read]
    needed = [plan.reads[other] for other in _needed(plan, read, write) if other in late]
    source = graph[min(needed)]
    return CausalityError(
        f"`{graph[read].site}` is given a value that depends on `{source.site}`, which comes "
        f"later in the run and is read at\n{source.location}\nA write can only use what is there "
        f"when the model passes the site; it stands at",
        graph[write].location,
    )


def _needed(plan: Plan, read: int, write: int) -> list[Address]:
    """The sites other than its own that a write needs."""
    mask = plan.needs[write] & ~plan.bits[read]
    if not mask:
        return []
    return [address for address, index in plan.reads.items() if mask & plan.bits[index]]


def _address(graph: Graph, read: int) -> Site:
    site = graph[read].site
    assert site is not None
    return site
