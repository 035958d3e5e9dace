"""One run of a block: it is planned, and its passes run in their order, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from insitu.batching.layout import UnexpectedShapeError
from insitu.batching.pass_plan import PassPlan
from insitu.batching.procedure import Outputs, Procedure, Subject
from insitu.engine.arrivals import Arrivals
from insitu.engine.backward_passes import run_backwards
from insitu.engine.eager import eagerly
from insitu.engine.execution import Execution
from insitu.engine.failures import Failed, FailedInvocations, Failures, ends_all
from insitu.engine.leaves import leaves_of
from insitu.engine.model_call import Pass
from insitu.engine.order import unexcused
from insitu.engine.passes import run_pass
from insitu.engine.places import View
from insitu.engine.plan import Plan
from insitu.graph.errors import BlockError, NeverRanError
from insitu.graph.lines import Lines
from insitu.graph.location import here
from insitu.graph.node import Graph
from insitu.tracing.never_ran import never_ran
from insitu.tracing.pass_costs import pass_costs
from insitu.tracing.planning import Prepared, explained, prepare

if TYPE_CHECKING:
    from insitu.engine.observed_run import ObservedRun


class Ran(NamedTuple):
    """How a block ran.

    Attributes:
        plan: its plan.
        outputs: what its passes returned, None if the procedure promises no output.
        failed: what its invocations raised, none if all have run.
    """

    plan: Plan
    outputs: Outputs | None
    failed: Sequence[FailedInvocations] = ()


def run_once(
    model: Subject,
    procedure: Procedure[Any],
    lines: Lines,
    requests: Sequence[Any],
    module: nn.Module,
    planned: list[PassPlan],
    failures: Failures | None,
    observed: ObservedRun | None = None,
    apart: bool = False,
) -> tuple[Plan, list[Any]]:
    """Runs a block once and fills its saved values, unless the run is spoiled.

    Args:
        model: as of `run_block`, and so are the others.
        procedure: likewise.
        lines: likewise.
        requests: likewise.
        module: the wrapped module, with its weights.
        planned: likewise.
        failures: takes what fails, so that the others run; None if that ends the run.
        observed: the run, as far as others look at it; None if nobody does.
        apart: whether each backward pass runs by itself.

    Returns:
        How it was run, and what its passes returned: None of those that failed.
    """
    for again in (True, False):
        prepared, passes = prepare(model, procedure, lines.graph, lines.saves, requests, module)
        planned[:] = prepared.passes
        tree, held = prepared.tree, prepared.exclusive
        execution = Execution(lines.graph, prepared.plan, tree.modules)
        if seeds := procedure.seeds(requests):
            execution.draw_from(seeds)
        if observed is not None:
            costs = [1.0] * len(passes)
            if observed.is_listened_to:
                costs = pass_costs(explained(model, procedure, requests, prepared.passes))
            _observe(observed, execution, prepared, costs, lines, again)
        with eagerly(held) if prepared.compiled else held:
            checked = None if observed is None else observed.check_in_modules(tree.modules)
            try:
                results, lacking, went = run_passes(
                    execution,
                    prepared,
                    passes,
                    lines.graph,
                    model,
                    procedure.views,
                    requests,
                    failures,
                    apart,
                )
            except UnexpectedShapeError:
                if again and model.look_at_weights():  # a weight was resized in its module
                    continue
                raise
            finally:
                if checked is not None:
                    checked.close()
                if execution.tape is not None:
                    if failures is not None and failures.is_spoiled:
                        execution.tape.take_back()
                    execution.tape.release()
        unexpected = failures is not None and failures.are_of(UnexpectedShapeError)
        if failures is not None and unexpected and again and model.look_at_weights():
            failures.forget()
            continue
        path = prepared.path
        if path.now == path.then:
            if tree.exchanges and tree.has_changed():
                _check_alike(procedure, requests)
            break
        if again:  # the model exchanged modules of its own while hooks were on the old ones
            _check_alike(procedure, requests)
            if failures is not None:
                failures.forget()
    if lacking is not None:
        raise _missing(model, procedure, lines.graph, requests, lacking, went)
    if failures is None or not failures.found:
        execution.fill(lines.saves if observed is None else observed.left(lines.saves))
        return prepared.plan, results
    for failed in failures.found:
        if failed.error is None:
            (node,) = failed.nodes
            graph = lines.graph
            failed.error = _missing(model, procedure, graph, requests, node, failed.went)
    if not failures.is_spoiled:
        there = {n: one for n, one in lines.saves.items() if n not in failures.lost.nodes}
        execution.fill(there if observed is None else observed.left(there))
    return prepared.plan, results


def _observe(
    observed: ObservedRun,
    execution: Execution,
    prepared: Prepared,
    costs: Sequence[float],
    lines: Lines,
    again: bool,
) -> None:
    """Lets others look at a run that is about to begin."""
    path = prepared.path
    invocations = [single.invocations for single in prepared.passes]

    def holds() -> bool:  # else the run is made again, with hooks on the modules that are there now
        return not again or path.now == path.then

    execution.observe(
        observed.passes(invocations, costs),
        partial(observed.saves_told, saves=lines.saves, uses=prepared.plan.uses, holds=holds),
    )


def run_passes(
    execution: Execution,
    prepared: Prepared,
    passes: list[Pass | None],
    graph: Graph,
    model: Subject,
    views: Mapping[str, View],
    requests: Sequence[Any],
    failures: Failures | None = None,
    apart: bool = False,
) -> tuple[list[Any], int | None, Arrivals | None]:
    """Runs the passes of a block, forward and backward.

    Args:
        execution: takes the values.
        prepared: how it is run.
        passes: the forward passes. They are taken out: what one leaves for others goes with
            the last of those.
        graph: what was recorded.
        model: the model.
        views: how outputs are shown, by path.
        requests: what the block's invocations were given.
        failures: takes what fails, so that the others run; None if that ends the run.
        apart: whether each backward pass runs by itself.

    Returns:
        What they returned; the node that reads a site where something had to arrive and did
        not, if that ends the run; and how the pass went in which it had to.
    """
    plan, returned = prepared.plan, prepared.returned
    modules, caches, observed = prepared.tree.modules, model.caches, execution.observed
    results: list[Any] = [None] * len(passes)
    for at, single in enumerate(passes):
        passes[at] = None
        assert single is not None
        if failures is not None and failures.found and failures.hold_up(single.cuts):
            continue
        if observed is not None:
            observed.begins(at)
        numbers, goes_into_others = single.cuts.keys(), single.through is not None
        try:
            results[at], missing, went = run_pass(
                execution, plan, single, modules, views, prepared.exclusive.hooks, returned, caches
            )
        except Exception as error:
            if failures is None or ends_all(error):
                raise
            failures.add(Failed(error, execution.failing, numbers), goes_into_others)
            execution.failing = missing = ()
        del single
        if observed is not None:
            observed.ended(at)
        if missing:
            lacking = unexcused(graph, plan, missing)
            if lacking is not None and failures is None:
                return results, lacking, went
            if lacking is not None and failures is not None:
                failed = Failed(None, (lacking,), numbers, went=went)
                failures.add(failed, goes_into_others)
                results[at] = None
        if failures is not None and failures.ends_run:
            return results, None, None
    if plan.gradients is not None:
        leaves = leaves_of(graph, plan.gradients, requests, modules[""])
        run_backwards(execution, plan.gradients.joint, leaves, failures, apart)
    return results, None, None


def form_of(procedure: Procedure[Any], requests: Sequence[Any], number: int) -> str:
    """What an invocation is called with, equal for arguments of equal shapes and dtypes."""
    return procedure.example(requests[number]).signature()


def _check_alike(procedure: Procedure[Any], requests: Sequence[Any]) -> None:
    """Raises if a run in which the model changed itself was of prompts of several lengths."""
    calls = {form_of(procedure, requests, number) for number in range(len(requests))}
    if len(calls) > 1:
        raise BlockError(
            "The model exchanged modules of its own in this run, as it does for some lengths "
            "of prompts, so these prompts did not all pass the same modules. Give each a block "
            "of its own, in the order that you want; the model stays as the last has left it.",
            here(),
        )


def _missing(
    model: Subject,
    procedure: Procedure[Any],
    graph: Graph,
    requests: Sequence[Any],
    lacking: int,
    went: Arrivals | None,
) -> NeverRanError:
    """The error for the node that reads a site at which something had to arrive."""
    site = graph[lacking].site
    assert site is not None
    try:
        call = procedure.example(requests[site.invocation])
        ran = model.probe(call, procedure.views).seen
    except Exception:  # the probe only adds to the message
        ran = None
    return never_ran(graph, model.modules, site, ran, went)
