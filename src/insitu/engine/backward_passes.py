"""The backward passes of a run, after its forward passes: in the order of their lines.

Those of invocations that have nothing to do with each other are run as one.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from insitu.engine.execution import Execution
from insitu.engine.failures import Failed, Failures, ends_all, operation_error
from insitu.engine.gradient_binding import Backward
from insitu.graph.changes import changing
from insitu.graph.context import entered
from insitu.graph.errors import CausalityError, InsituError
from insitu.graph.expression import expression


def run_backwards(
    execution: Execution,
    groups: Sequence[Backward],
    leaves: Sequence[torch.Tensor],
    failures: Failures | None = None,
    apart: bool = False,
) -> None:
    """Runs the backward passes of a run.

    Args:
        execution: has the values, and takes the gradients.
        groups: the passes in their order, together those that may run as one.
        leaves: the user's own tensors that want gradients.
        failures: takes what fails, so that the others run; None if that ends the run.
        apart: whether each is to run by itself, which tells which one fails.

    Raises:
        InsituError: if one fails, pointing at its line.
    """
    for number, (group, *_) in enumerate(groups):
        # A loss of an invocation that has failed has no value.
        if failures is not None and failures.found:
            group = [index for index in group if index not in failures.lost.nodes]
        # One of a group that cannot start would fail the others: alone it fails alone.
        as_one = not apart and all(_starts_well(execution, index) for index in group)
        parts = [group] if as_one else [[index] for index in group]
        for at, part in enumerate(parts if group else ()):
            if execution.observed is not None:
                execution.observed.backward_begins()
            # Autograd frees its graph in the last pass, and must keep it for those before: a batch
            # has one graph for all.
            last = number + 1 == len(groups) and at + 1 == len(parts)
            try:
                for index in part:
                    execution.failing = (index,)
                    _check_complete(execution, index)
                execution.failing = part
                _run(execution, part, leaves, not last)
            except Exception as error:
                if failures is None or ends_all(error):
                    raise
                failed, execution.failing = execution.failing, ()
                failures.add(Failed(error, failed, _of_pass(execution, failures, failed), True))
                if failures.ends_run:
                    return


def _of_pass(execution: Execution, failures: Failures, nodes: Sequence[int]) -> Collection[int]:
    """The invocations that a backward pass goes through; one of them may be to blame."""
    # In a batch autograd goes through rows of all prompts, and an error names none of them.
    if len(nodes) == 1 and execution.tape is not None and execution.tape.is_batched:
        return {address[0] for address in execution.plan.reads}
    return failures.dependence.invocations(nodes)


def _check_complete(execution: Execution, index: int) -> None:
    """Raises if what a backward pass starts with is not there."""
    graph, tape = execution.graph, execution.tape
    assert tape is not None
    if tape.done.issuperset(graph.rows[index][3]):
        return
    raise CausalityError(
        f"`{expression(graph, index)}` depends on what comes after it: a gradient of its own, or "
        "of a later backward pass.",
        graph[index].location,
    )


def _starts_well(execution: Execution, index: int) -> bool:
    """Whether a backward pass may be one with others, so that none of these fails for it."""
    losses = [execution._values[source] for source in execution.graph.rows[index][3]]
    return all(
        isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1
        for loss in losses
    )


def _run(
    execution: Execution, group: Sequence[int], leaves: Sequence[torch.Tensor], goes_on: bool
) -> None:
    """Runs one backward pass, or several as one; others of the run may come after it."""
    graph, tape = execution.graph, execution.tape
    assert tape is not None
    first = group[0]
    starts: dict[int, Any] = {}
    options: Any = {}
    for index in group:
        starts[index], options = execution.resolved(*graph.rows[index][1:3])
    try:
        context = graph.contexts.get(first)
        with changing() as changes, entered(context and context._replace(grad=True)):
            # Also if the user's line stood in `torch.no_grad()`: a backward pass that was asked for
            # is made.
            changes.gradients(True)
            found = tape.backward(starts, options, leaves, tape.is_batched and goes_on)
            if execution._uses[first]:
                execution.arrive(first, found)
    except InsituError:
        raise
    except Exception as error:
        raise operation_error(graph, execution._values, first, error) from error
    for index in group:
        for source in graph.rows[index][3]:
            execution._use(source)
