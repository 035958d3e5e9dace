"""What comes too late or never: which reads of that are errors, and which error a write is."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from insitu.engine.plan import Plan
from insitu.graph.errors import CausalityError, InsituError, NeverRanError
from insitu.graph.expression import expression
from insitu.graph.node import Graph


def unexcused(graph: Graph, plan: Plan, missing: Collection[int]) -> int | None:
    """Returns the first read of what never came that something other than optional saves is for.

    Args:
        graph: what was to be done.
        plan: its plan.
        missing: the nodes that read what never came.
    """
    used = {source for node in graph for source in node.inputs}
    required = {*plan.writes.values(), *plan.skips.values()}
    for index in sorted(missing):
        for node, need in enumerate(plan.needs):
            ends = node in required or (node not in used and node not in graph.optional)
            if ends and need & plan.bits[index]:
                return index
    return None


def causality_error(graph: Graph, read: int, write: int, late: Collection[int]) -> CausalityError:
    """Returns the error for a write, or a skip, that needs what comes after it.

    Args:
        graph: the recorded experiment.
        read: the node that reads the site that is written, or the arguments of the skipped module.
        write: the write or the skip.
        late: the nodes that read what comes too late.
    """
    source = graph[min(late)]
    return CausalityError(
        f"`{expression(graph, read)}` is given a value that depends on "
        f"`{expression(graph, min(late))}`, which comes "
        f"later in the run and is read at\n{source.location}\nA write can only use values "
        f"that are there when the model passes the site; it stands at",
        graph[write].location,
    )


def too_early(
    graph: Graph, plan: Plan, read: int, write: int, missing: int, ended: Mapping[int, int]
) -> InsituError:
    """Returns the error for a write, or a skip, whose value is not there when it is needed.

    Args:
        graph: the recorded experiment.
        plan: its plan.
        read: as of `causality_error`.
        write: as of `causality_error`.
        missing: the sites that it waits for, as a set of bits.
        ended: the invocations that have no further steps, with how many they had.
    """
    late = [index for index, bit in plan.bits.items() if missing & bit]
    for index in late:
        site = graph[index].site
        if site is not None and site.invocation in ended:
            return NeverRanError(
                f"`{expression(graph, read)}` is given a value that depends on "
                f"`{expression(graph, index)}` of an invocation that ended after "
                f"{ended[site.invocation]} steps, and this one goes on; it stands at",
                graph[write].location,
            )
    return causality_error(graph, read, write, late)
