"""Running a block that is planned: its passes in their order, and then its backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from insitu.graph.errors import InsituError
from insitu.graph.node import Graph
from insitu.runtime.arrivals import Arrivals
from insitu.runtime.execution import Execution
from insitu.runtime.gradients import leaves_of
from insitu.runtime.hooks import View
from insitu.runtime.order import unexcused
from insitu.runtime.passes import Pass, run_pass
from insitu.runtime.procedure import Subject
from insitu.tracing.planning import Prepared


def run_passes(
    execution: Execution,
    prepared: Prepared,
    passes: list[Pass | None],
    done: Callable[[int], None] | None,
    graph: Graph,
    model: Subject,
    views: Mapping[str, View],
    requests: Sequence[Any],
) -> tuple[list[Any], int | None, Arrivals | None]:
    """Runs the passes of a block, forward and backward.

    Args:
        execution: takes the values.
        prepared: how it is run.
        passes: the forward passes. They are taken out: what one leaves for others goes with
            the last of those.
        done: is told which pass is done; None if nobody wants to know.
        graph: what was recorded.
        model: the model.
        views: how outputs are shown, by path.
        requests: what the block's invocations were given.

    Returns:
        What they returned; the node that reads a site where something had to arrive and did
        not, if there is one; and how the pass went in which it had to.
    """
    plan, order, returned = prepared.plan, prepared.order, prepared.returned
    results: list[Any] = [None] * len(passes)
    for at in order:
        single, passes[at] = passes[at], None
        assert single is not None
        try:
            results[at], missing, went = run_pass(
                execution, plan, single, model.snapshot.modules, views, returned, model.caches
            )
        except RuntimeError as error:
            tape, own = execution.tape, isinstance(error, InsituError)
            explained = None if tape is None or own else tape.explained(error)
            if explained is None:
                raise
            raise explained from error
        del single
        if done is not None:
            done(at)
        if missing:
            lacking = unexcused(graph, plan, missing)
            if lacking is not None:
                return results, lacking, went
    if plan.gradients is not None:
        leaves = leaves_of(graph, plan.gradients, requests, model.snapshot.modules[""])
        execution.run_backwards(leaves)
    return results, None, None
