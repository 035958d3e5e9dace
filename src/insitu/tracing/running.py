"""Running a block: all of it, or what a failure leaves of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from insitu.batching.pass_plan import PassPlan
from insitu.batching.procedure import Procedure, Subject
from insitu.engine.failures import Failures
from insitu.engine.seams import seams
from insitu.graph.errors import OptionError
from insitu.graph.lines import Lines
from insitu.graph.location import Location, Mark
from insitu.tracing.beforehand import check_fit
from insitu.tracing.one_run import Ran, form_of, run_once

if TYPE_CHECKING:
    from insitu.engine.observed_run import NamedLines, ObservedRun


def run_block(
    model: Subject,
    procedure: Procedure[Any],
    lines: NamedLines,
    requests: Sequence[Any],
    demanded: tuple[Mapping[str, Any], Mark] | None,
    planned: list[PassPlan],
) -> Ran:
    """Runs a block and fills its saved values, those that no sink takes.

    If one of several invocations fails, the others run all the same, and what they save is there.

    Args:
        model: the model. Its weights are loaded if they are not there.
        procedure: how it runs.
        lines: what was recorded.
        requests: what each invocation was given.
        demanded: options that a value of the block takes, and the line that reads it; None if
            there are none.
        planned: gets what each pass does.

    Raises:
        InsituError: for what is wrong with the run, if nothing of it can run.
    """
    around = seams.get()
    if around is None:
        return _run(model, procedure, lines, requests, demanded, planned, None)
    from insitu.engine.observed_run import run_observed  # of use only where somebody looks

    run = partial(_run, model, procedure, lines, requests, demanded, planned)
    return run_observed(around, lines, run)


def _run(
    model: Subject,
    procedure: Procedure[Any],
    lines: Lines,
    requests: Sequence[Any],
    demanded: tuple[Mapping[str, Any], Mark] | None,
    planned: list[PassPlan],
    observed: ObservedRun | None,
) -> Ran:
    """Runs a block, as of `run_block`, that others may look at."""
    if model.loaded:
        module = model.snapshot.root
    else:
        check_fit(lines, model.knows_dtypes, partial(form_of, procedure, requests))
        module = model.load()
    if demanded is not None:
        verify(model, *demanded)
    failures = None if len(requests) == 1 else Failures(lines.graph)
    plan, results = run_once(model, procedure, lines, requests, module, planned, failures, observed)
    if failures is None or not failures.found:
        stopped = plan.stops and len(requests) == 1
        return Ran(plan, None if stopped else procedure.outputs(results, requests))
    from insitu.tracing.isolation import run_rest  # of use only where something fails

    return run_rest(model, procedure, lines, requests, planned, failures, plan, results, observed)


def verify(model: Subject, options: Mapping[str, Any], line: Mark) -> None:
    """Raises if the model computes something else with what a value demands.

    Args:
        model: the model, with its weights.
        options: the options that the value takes.
        line: the line that reads it.

    Raises:
        OptionError: in that case.
    """
    if not model.vocabulary.verify(options):
        raise OptionError(
            "The attention of this model computes something else where its softmax can be "
            "seen, which is known now that its weights are there: give "
            "`attn_implementation='eager'` where the model is made.",
            Location(*line),
        )
