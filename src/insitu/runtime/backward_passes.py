"""The backward passes of a run, after its forward passes: in the order of their lines.

Those of invocations that have nothing to do with each other are run as one.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from insitu.graph.context import entered
from insitu.graph.errors import CausalityError, InsituError
from insitu.graph.expression import expression
from insitu.runtime.execution import Execution, set_grad_enabled
from insitu.runtime.failure import failure
from insitu.runtime.gradient_binding import Backward


def run_backwards(
    execution: Execution, groups: Sequence[Backward], leaves: Sequence[torch.Tensor]
) -> None:
    """Runs the backward passes of a run.

    Args:
        execution: has the values, and takes the gradients.
        groups: the passes in their order, together those that may run as one.
        leaves: the user's own tensors that want gradients.

    Raises:
        InsituError: if one fails, pointing at its line.
    """
    for number, (group, *_) in enumerate(groups):
        for index in group:
            _check_complete(execution, index)
        as_one = all(_starts_well(execution, index) for index in group)
        parts = [group] if as_one else [[index] for index in group]
        for at, part in enumerate(parts):
            last = number + 1 == len(groups) and at + 1 == len(parts)
            _run(execution, part, leaves, not last)


def _check_complete(execution: Execution, index: int) -> None:
    """Raises if what a backward pass starts with is not there."""
    graph = execution._graph
    if all(source in execution._done for source in graph.rows[index][3]):
        return
    raise CausalityError(
        f"`{expression(graph, index)}` depends on what comes after it: a gradient of its own, or "
        "of a later backward pass.",
        graph[index].location,
    )


def _starts_well(execution: Execution, index: int) -> bool:
    """Whether a backward pass may be one with others, of which none is to fail for it."""
    losses = [execution._values[source] for source in execution._graph.rows[index][3]]
    return all(
        isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1
        for loss in losses
    )


def _run(
    execution: Execution, group: Sequence[int], leaves: Sequence[torch.Tensor], goes_on: bool
) -> None:
    """Runs one backward pass, or several as one; others of the run may come after it."""
    graph, tape = execution._graph, execution.tape
    assert tape is not None
    first = group[0]
    starts: dict[int, Any] = {}
    options: Any = {}
    for index in group:
        starts[index], options = execution.resolved(*graph.rows[index][1:3])
    grad_enabled = torch.is_grad_enabled()
    try:
        set_grad_enabled(True)
        context = graph.contexts.get(first)
        with entered(context and context._replace(grad=True)):
            found = tape.backward(starts, options, leaves, tape.is_batched and goes_on)
            if execution._uses[first]:
                execution.arrive(first, found)
    except InsituError:
        raise
    except Exception as error:
        raise failure(graph, execution._values, first, error) from error
    finally:
        set_grad_enabled(grad_enabled)
    for index in group:
        for source in graph.rows[index][3]:
            execution._use(source)
