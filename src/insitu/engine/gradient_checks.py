"""Gradients that a graph cannot have, found before the model runs."""

from __future__ import annotations

from insitu.engine.leaves import constants_of
from insitu.engine.plan import Plan
from insitu.graph.errors import CausalityError, OperationError
from insitu.graph.expression import expression
from insitu.graph.node import EVERY, Function, Graph
from insitu.graph.operations import APPLY, READ


def check_gradients(graph: Graph, plan: Plan) -> None:
    """Finds, before the model runs, gradients that cannot be had, and constants that want some.

    Raises:
        OperationError: if one is of every step.
        CausalityError: if the model would have to wait for one.
    """
    assert plan.gradients is not None
    plan.gradients.constants = [at for at in range(len(graph)) if constants_of(graph, at)]
    plan.gradients.opaque = any(
        row[0] is APPLY and isinstance(row[1][0], Function) for row in graph.rows
    )
    backwards, bound = list(plan.gradients.bound), plan.gradients.bound
    grads = [grad for found in bound.values() for grad in found]
    late = sum(plan.bits[index] for index in (*backwards, *grads))
    for read, write in (*graph.writes.items(), *graph.skips.items()):
        if graph[read].operation is READ and plan.needs[write] & late:
            raise CausalityError(
                f"`{expression(graph, read)}` is given a value that depends on a gradient, and "
                "gradients come when the model has run.",
                graph[write].location,
            )
    every = sum(plan.bits[index] for address, index in plan.reads.items() if address[4] == EVERY)
    for index in (*backwards, *grads):
        if any(plan.needs[source] & every for source in graph.rows[index][3]):
            raise OperationError(
                f"`{expression(graph, index)}` cannot be in `every_step`: take single steps.",
                graph[index].location,
            )
