"""Running a block: its plan is found or made, and its passes run, forward and backward.

How a plan is made is in `planning.py`, and which lines run again after a failure in `isolation.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from insitu.batching.layout import UnexpectedShapeError
from insitu.batching.pass_plan import renumbered
from insitu.batching.procedure import Subject
from insitu.engine.arrivals import Arrivals
from insitu.engine.backward_passes import run_backwards
from insitu.engine.eager import eagerly
from insitu.engine.execution import Execution
from insitu.engine.failures import Failed, Failures, ends_all
from insitu.engine.leaves import leaves_of
from insitu.engine.model_call import Pass
from insitu.engine.order import unexcused
from insitu.engine.passes import run_pass
from insitu.engine.plan import Plan
from insitu.engine.probe import ambient
from insitu.engine.seams import seams
from insitu.graph.bounds import counting
from insitu.graph.errors import BlockError
from insitu.graph.location import here
from insitu.tracing.beforehand import check_fit, verify
from insitu.tracing.never_ran import missing_value
from insitu.tracing.planning import Prepared, explained, plan_run
from insitu.tracing.run import Run

if TYPE_CHECKING:
    from insitu.engine.observed_run import ObservedRun


def run_block(run: Run) -> None:
    """Runs a block and fills its saved values, those that no sink takes.

    If one of several invocations fails, the others run all the same, and what they save is there.

    Args:
        run: the block.

    Raises:
        InsituError: if something is wrong with the run, if nothing of it can run.
    """
    around = seams.get()
    if around is not None and run.observed is None:
        from insitu.engine.observed_run import run_observed  # of use only where somebody looks

        def run_so(observed: ObservedRun) -> None:
            run.observed = observed
            run_block(run)

        run_observed(around, run.lines, run_so)
        return
    model, requests = run.model, run.requests
    # Loading takes long: a line that cannot fit is found before it.
    if not model.loaded:
        check_fit(run)
        model.load()
    # Whether the softmax can be seen was found without weights, and is certain only now.
    if run.demanded is not None:
        verify(model, *run.demanded)
    # With one prompt there are no others to save: its error is raised as it is.
    failures = None if len(requests) == 1 else Failures(run.lines.graph)
    plan, results = run_once(run, failures)
    if failures is not None and failures.found:
        _run_rest(run, failures, plan, results)
    elif plan.stops:
        run.is_stopped = True
        if len(requests) > 1:
            run.outputs = run.procedure.outputs(results, requests)
    else:
        run.outputs = run.procedure.outputs(results, requests)


def _run_rest(run: Run, failures: Failures, plan: Plan, results: list[Any]) -> None:
    """Runs the rest of a block in which something failed, and fills the saved values.

    Args:
        run: the block.
        failures: what failed.
        plan: how it was run.
        results: what its passes returned.
    """
    # Of use only where something fails.
    from insitu.tracing.isolation import Isolation, spread_outputs

    isolation = Isolation(run, failures)
    part = run
    # What failed has gone into values of others, so they are computed anew without it.
    while failures.is_spoiled:
        part = isolation.rest()
        if not part.requests:
            break
        failures = Failures(part.lines.graph, isolation.goes_on)
        budget = counting.get()
        with nullcontext() if budget is None else budget.part(isolation.nodes):
            plan, results = run_once(part, failures, isolation.apart)
        run.passes = [renumbered(single, isolation.numbers) for single in part.passes]
        if failures.found:
            isolation.take(failures.found)
    run.failed = isolation.ended()
    run.is_stopped = bool(plan.stops)
    if not part.requests or (plan.stops and len(part.requests) == 1):
        return
    outputs = run.procedure.outputs(results, part.requests)
    if outputs is not None:
        run.outputs = spread_outputs(outputs, isolation.numbers, len(run.requests))


def run_once(run: Run, failures: Failures | None, apart: bool = False) -> tuple[Plan, list[Any]]:
    """Runs a block once and fills its saved values, unless the run is spoiled.

    Args:
        run: the block.
        failures: takes what fails, so that the others run; None if that ends the run.
        apart: whether each backward pass runs by itself.

    Returns:
        How it was run, and what its passes returned: None of those that failed.
    """
    model, lines, observed = run.model, run.lines, run.observed
    # A second time only if the model has changed under the run, which it does once.
    for again in (True, False):
        prepared, passes = prepare(run)
        if prepared.bare and again and failures is None and observed is None:
            done = _run_bare(run, prepared, passes.pop())
            if done is not None:
                return prepared.plan, done
            continue
        tree, held = prepared.tree, prepared.exclusive
        # Made anew each time: values of a run that did not hold must not be found again.
        execution = Execution(lines.graph, prepared.plan, tree.modules)
        if prepared.plan.drawing and (seeds := run.procedure.seeds(run.requests)):
            execution.draw_from(seeds)
        if observed is not None:
            _observe(observed, execution, prepared, run, again)
        with eagerly(held) if prepared.compiled else held:
            checked = None if observed is None else observed.check_in_modules(tree)
            try:
                results, lacking, went = run_passes(
                    run, execution, prepared, passes, failures, apart
                )
            except UnexpectedShapeError:
                if again and model.look_at_weights():  # a weight was resized in its module
                    continue
                raise
            finally:
                if checked is not None:
                    checked.close()
                if execution.tape is not None:
                    # The same backward pass will run again, and would add to the user's tensors
                    # twice.
                    if failures is not None and failures.is_spoiled:
                        execution.tape.take_back()
                    execution.tape.release()
        unexpected = failures is not None and failures.are_of(UnexpectedShapeError)
        # The same in a block of several, where the error was noted and not raised.
        if failures is not None and unexpected and again and model.look_at_weights():
            failures.forget()
            continue
        path = prepared.path
        if path.now == path.then:
            if tree.exchanges and tree.has_changed():
                _check_alike(run)
            break
        if again:  # the model exchanged modules of its own while hooks were on the old ones
            _check_alike(run)
            if failures is not None:
                failures.forget()
    if lacking is not None:
        raise missing_value(run, lacking, went)
    if failures is None or not failures.found:
        execution.fill(lines.saves if observed is None else observed.left(lines.saves))
        return prepared.plan, results
    for failed in failures.found:
        if failed.error is None:
            (node,) = failed.nodes
            failed.error = missing_value(run, node, failed.went)
    # What failed has touched nobody else: the values of the others are those that they have alone.
    if not failures.is_spoiled:
        there = {n: one for n, one in lines.saves.items() if n not in failures.lost.nodes}
        execution.fill(there if observed is None else observed.left(there))
    return prepared.plan, results


def _run_bare(run: Run, prepared: Prepared, single: Pass) -> list[Any] | None:
    """Does what `run_once` does for a block of one pass with nothing to do around it, as most are.

    Args:
        run: the block, at which nobody looks.
        prepared: how it is run.
        single: the pass.

    Returns:
        What the pass returned; None if the model exchanged modules of its own in it.
    """
    lines, held, path = run.lines, prepared.exclusive, prepared.path
    execution = Execution(lines.graph, prepared.plan, prepared.tree.modules)
    with held:
        result, missing, went = run_pass(
            execution, single, run.procedure.views, held.hooks, run.model.caches
        )
    if path.now != path.then:
        return None
    if missing:
        lacking = unexcused(lines.graph, prepared.plan, missing)
        if lacking is not None:
            raise missing_value(run, lacking, went)
    execution.fill(lines.saves)
    return [result]


def prepare(run: Run, dry: bool = False) -> tuple[Prepared, list[Pass]]:
    """Plans the run of a block, or finds how one like it was planned, and gives its passes too.

    The passes are the caller's to take out of their list: what they hold goes with them.

    Args:
        run: the block.
        dry: whether it will not run.

    Raises:
        InsituError: if something is wrong with the run, as far as that is found beforehand.
    """
    model, procedure, lines, requests = run.model, run.procedure, run.lines, run.requests
    if not requests:
        raise BlockError(
            "The block has no prompt: give it one, or write `with tracer.invoke(prompt):` inside.",
            here(4),
        )
    graph, saves, module = lines.graph, lines.saves, model.snapshot.root
    prepared: Prepared | None = None
    key, plans = procedure.key(module, requests), model.plans
    if key is not None:
        key, prepared = plans.find(key, graph, saves)
        if prepared is not None and not (
            prepared.path.still_holds() and (prepared.alone or _all_holds(prepared, model))
        ):
            prepared = None
    if prepared is not None:
        run.passes = prepared.passes
        return prepared, procedure.passes(module, prepared.passes, requests)
    # A scan runs nothing, so there is nothing to be random.
    if not dry:
        model.warn_of_noise()
    model.look_at_weights()
    # The tree has changed, so that plans of before are gone, and the key is another.
    if model.look(closely=True) or model.plans is not plans:
        key, plans = procedure.key(module, requests), model.plans
        if key is not None:
            key, _ = plans.find(key, graph, saves)
    prepared, passes = plan_run(run)
    run.passes = prepared.passes
    if key is not None:
        plans.keep(key, graph, saves, prepared)
    return prepared, passes


def _all_holds(prepared: Prepared, model: Subject) -> bool:
    """Whether all of the tree is as it was planned for.

    What may be shared by several invocations depends on that, and so does what a module that is
    skipped would return.
    """
    if prepared.plan.returned and (model.look_at_weights() or prepared.ambient != ambient()):
        return False
    return not (model.snapshot.has_changed() or model.snapshot.runs_otherwise())


def _observe(
    observed: ObservedRun, execution: Execution, prepared: Prepared, run: Run, again: bool
) -> None:
    """Lets others look at a run that is about to begin."""
    from insitu.engine.observed_passes import ObservedPasses  # of use only where somebody looks

    path = prepared.path
    costs = [1.0] * len(run.passes)
    # A pass alone is all of the progress, whatever it costs.
    if len(costs) > 1 and observed.is_listened_to:
        costs = explained(run).costs
    invocations = [single.invocations for single in run.passes]

    def holds() -> bool:  # else the run is made again, with hooks on the modules that are there now
        return not again or path.now == path.then

    execution.observe(
        ObservedPasses(observed, invocations, costs),
        partial(observed.saves_told, saves=run.lines.saves, uses=prepared.plan.uses, holds=holds),
    )


def run_passes(
    run: Run,
    execution: Execution,
    prepared: Prepared,
    passes: list[Pass],
    failures: Failures | None,
    apart: bool,
) -> tuple[list[Any], int | None, Arrivals | None]:
    """Runs the passes of a block, forward and backward.

    Args:
        run: the block.
        execution: takes the values.
        prepared: how it is run.
        passes: the forward passes. They are taken out: what one leaves for others goes with
            the last of those.
        failures: takes what fails, so that the others run; None if that ends the run.
        apart: whether each backward pass runs by itself.

    Returns:
        What they returned; the node that reads a site where something had to arrive and did
        not, if that ends the run; and how the pass went in which it had to.
    """
    plan, graph = prepared.plan, run.lines.graph
    modules, hooks, observed = prepared.tree.modules, prepared.exclusive.hooks, execution.observed
    views, caches = run.procedure.views, run.model.caches
    results: list[Any] = [None] * len(passes)
    if plan.start is not None:
        try:
            execution.begin(plan.start)
        except Exception as error:
            if failures is None or ends_all(error):
                raise
            # Those after it have not run: they do without it.
            failures.add(Failed(error, execution.failing, ()), goes_into_others=True)
            execution.failing = ()
            return results, None, None
    for at in range(len(passes)):
        # Taken out, so that what it refers to is gone before the next one runs: memory is that of
        # one pass.
        single = passes.pop(0)
        # It would only run on values that are not there.
        if failures is not None and failures.found and failures.hold_up(single.cuts):
            continue
        if observed is not None:
            observed.begins(at)
        numbers, goes_into_others = single.cuts.keys(), single.through is not None
        try:
            results[at], missing, went = run_pass(execution, single, views, hooks, caches)
        except Exception as error:
            if failures is None or ends_all(error):
                raise
            failures.add(Failed(error, execution.failing, numbers), goes_into_others)
            execution.failing = missing = ()
            went = None
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
        leaves = leaves_of(graph, plan.gradients, run.requests, modules[""])
        run_backwards(execution, plan.gradients.joint, leaves, failures, apart)
    return results, None, None


def _check_alike(run: Run) -> None:
    """Raises if a run in which the model changed itself was of prompts of several lengths."""
    if len({run.call(number).signature() for number in range(len(run.requests))}) > 1:
        raise BlockError(
            "The model exchanged modules of its own in this run, as it does for some lengths "
            "of prompts, so these prompts did not all pass the same modules. Give each a block "
            "of its own, in the order that you want; the model stays as the last has left it.",
            here(),
        )
