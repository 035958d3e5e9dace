"""Sites that are written in place in every step and used in one, or the other way round.

What runs in every step runs before what runs in one. Lines in another order than that would see
what is written after them, or would not see what is written before them, so they are refused.
Assignments are refused where they are recorded, in `graph/intervention.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from insitu.graph.errors import OperationError
from insitu.graph.expression import expression
from insitu.graph.node import Graph, Site
from insitu.graph.operations import READ
from insitu.runtime.memory import Key
from insitu.runtime.plan import Plan


def refuse_mixed_steps(graph: Graph, plan: Plan, memory: Sequence[frozenset[Key]]) -> None:
    """Raises if a write in place of every step does not stand before lines of single steps.

    Args:
        graph: what is to be done.
        plan: its plan, in which everything needs what the writes before it need.
        memory: the memory of each node's value.

    Raises:
        OperationError: if one does not.
    """
    if plan.repeated is None:
        return
    needs, nodes = plan.needs, plan.repeated.nodes
    repeated, saved = set(nodes), set(plan.repeated.saves)
    viewed = _viewed(graph, memory)
    used = [
        viewed[index].union(*(viewed[source] for source in row[3]))
        for index, row in enumerate(graph.rows)
    ]
    for write in graph.mutations:
        written = viewed[graph.rows[write][3][0]]  # what else it is given is only looked at
        if write in repeated:
            others = (index for index in range(write) if index not in repeated)
        else:
            # What needs the site of the write waits for it, and so sees what step 0 writes.
            others = (
                index
                for index in nodes
                if index > write
                and needs[write] & ~needs[index]
                and (graph.rows[index][0] is not READ or index in saved)
            )
        other = next((index for index in others if not used[index].isdisjoint(written)), None)
        if other is None:
            continue
        early, late = sorted((write, other))
        place = next(iter(written & used[other]))
        raise OperationError(
            f"`{expression(graph, late)}` is of {_which(late, repeated)}, and "
            f"`{expression(graph, early)}` before it is of {_which(early, repeated)}, at\n"
            f"{graph[early].location}\nOne of them writes to `{place}`, and what holds in every "
            "step comes before what holds in one: put the `every_step` block first, or write "
            "`for step in generator.steps:` for it. The later line is",
            graph[late].location,
        )


def _which(index: int, repeated: Collection[int]) -> str:
    return "every step" if index in repeated else "one step"


def _viewed(graph: Graph, memory: Sequence[frozenset[Key]]) -> Sequence[frozenset[Site]]:
    """The places whose memory the value of each node has, whatever the step."""
    viewed: list[frozenset[Site]] = []
    for index, (_, _, _, inputs, _, _) in enumerate(graph.rows):
        site = graph[index].site
        own = frozenset[Site]() if site is None else frozenset([site._replace(step=0)])
        views = (viewed[source] for source in inputs if memory[source] & memory[index])
        viewed.append(own.union(*views))
    return viewed
