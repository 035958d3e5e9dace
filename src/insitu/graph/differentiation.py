"""Recording derivatives: gradients that are read or written, and backward passes."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.encoding import add_node, described
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.node import NO_KWARGS, Ref, WeightRef, ref
from insitu.graph.operations import BACKWARD, GETITEM, GRAD, WRITE
from insitu.graph.recorded import AnyRecorded, Recorded, holds, refuse_structure
from insitu.graph.recording import Recording


def read_gradient(recording: Recording, source: Ref, mark: Mark, of: Ref | None = None) -> Ref:
    """Returns what stands for the gradient of a value for lines that come now.

    Args:
        recording: where it is recorded.
        source: the value.
        mark: the user's line.
        of: the backward pass that it is of; None for the one of the `with` around the line, or for
            the one that `Proxy.grad` names.
    """
    of = of or recording.differentiated
    if recording.gradients is None:
        recording.gradients = {}
    source = recording.current(source)
    there = recording.gradients.setdefault(of, {})
    standing = there.get(source)
    if standing is None:
        rows = recording.graph.rows
        standing = there[source] = ref(len(rows))
        args, inputs = (source,), source.inputs
        if of is not None:
            args, inputs = (source, of), (source.index, of.index)
        rows.append((GRAD, args, NO_KWARGS, inputs, False, mark))
        recording.graph.differentiates = True
    return standing


def write_gradient(recording: Recording, source: Ref, value: Any, mark: Mark) -> None:
    """Records that a value takes the place of a gradient on its way.

    Args:
        recording: where it is recorded.
        source: the value that it is the gradient of.
        value: as of `intervention.write`.
        mark: the user's line.
    """
    source = recording.current(source)
    standing = read_gradient(recording, source, mark)
    if holds(recording, standing, value):
        return
    original = recording.graph.original(standing.index)
    args = (Recorded(recording, ref(original)), value, False)
    written = add_node(recording, WRITE, args, NO_KWARGS, mark)
    recording.graph.writes[original] = written.index
    cast("dict[Any, dict[Ref, Ref]]", recording.gradients)[recording.differentiated][source] = (
        written
    )


def record_backward(
    recording: Recording,
    losses: Sequence[Any],
    options: Mapping[str, Any],
    inputs: Sequence[Any] | None,
    mark: Mark,
) -> tuple[Ref, list[Ref]]:
    """Records a backward pass.

    Args:
        recording: where it is recorded.
        losses: where it starts: recorded values.
        options: keyword arguments of the operation, but for `inputs`.
        inputs: whose gradients it returns: values of this block, weights of the model, tensors of
            the user's. None for none.
        mark: the user's line.

    Returns:
        Its node, and the nodes that stand for the gradients that it returns.

    Raises:
        OperationError: if there are no inputs or one of them is something else.
    """
    if inputs is None:
        backward = add_node(recording, BACKWARD, tuple(losses), options, mark)
        gradients = list[Ref]()
    else:
        checked = [_checked(recording, item, mark) for item in inputs]
        if not checked:
            raise OperationError(
                "`inputs=` is empty: name the values and the weights whose gradients are wanted.",
                Location(*mark),
            )
        named = [item for item in checked if not isinstance(item, Ref)]
        backward = add_node(recording, BACKWARD, tuple(losses), {**options, "inputs": named}, mark)
        gradients = _returned(recording, backward, checked, mark)
    if recording.gradients is not None:  # lines that come now may mean this one
        recording.gradients.pop(None, None)
    recording.graph.differentiates = True
    return backward, gradients


def _checked(recording: Recording, item: Any, mark: Mark) -> Any:
    """One of the inputs of a backward pass: a reference, a weight of the model or a tensor."""
    if isinstance(item, AnyRecorded):
        if item._recording is recording:
            if not item._operand:
                refuse_structure(item, Location(*mark))
            return recording.current(item._ref)
        item = item.result(Location(*mark))
    if not isinstance(item, torch.Tensor):
        raise OperationError(
            f"{described(item)} has no gradient: `inputs` are values of the block, tensors, and "
            "weights of the model such as those of `model.module.parameters()`.",
            Location(*mark),
        )
    if recording.shapes is not None:
        for path, weight in recording.shapes.model.modules[""].named_parameters():
            if weight is item:
                return WeightRef(path)
    return item


def _returned(recording: Recording, backward: Ref, inputs: Sequence[Any], mark: Mark) -> list[Ref]:
    """The nodes that stand for the gradients of inputs, in their order."""
    found: list[Ref] = []
    named = 0
    for item in inputs:
        if isinstance(item, Ref):
            found.append(read_gradient(recording, item, mark, backward))
            continue
        rows = recording.graph.rows
        rows.append((GETITEM, (backward, named), NO_KWARGS, backward.inputs, False, mark))
        found.append(ref(len(rows) - 1))
        named += 1
    return found
