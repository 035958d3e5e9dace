"""Recording derivatives: gradients that are read or written, and backward passes."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import torch

from insitu.graph.encoding import add_node, described
from insitu.graph.errors import BlockError, OperationError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import NO_KWARGS, Ref, WeightRef, ref
from insitu.graph.operations import BACKWARD, GETITEM, GRAD, WRITE
from insitu.graph.optimisers import refuse_steps
from insitu.graph.read_only import writable
from insitu.graph.recorded import AnyRecorded, Recorded, refuse_structure
from insitu.graph.recording import Recording
from insitu.graph.standing import holds


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


class BackwardPass(tuple[Any, ...]):
    """A recorded backward pass: the gradients of its `inputs`, as a tuple.

    In `with loss.backward():` every `.grad` is that of this pass, wherever it stands among others.
    """

    _recording: Recording
    _ref: Ref
    _around: Ref | None

    def __enter__(self) -> Self:
        """Lets `.grad` mean the gradients of this pass.

        Raises:
            BlockError: if the block has ended.
        """
        recording = self._recording
        if not recording.open:
            raise BlockError("The block of this backward pass has ended.", here())
        self._around, recording.differentiated = recording.differentiated, self._ref
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Lets `.grad` mean what it meant before."""
        self._recording.differentiated = self._around

    def __repr__(self) -> str:
        gradients = "" if not self else f" of {len(self)} inputs"
        return f"<Backward pass{gradients}>"


def backward_pass(
    losses: Sequence[Any],
    options: Mapping[str, Any],
    inputs: Any,
    mark: Mark,
    kind: type[Recorded],
) -> BackwardPass:
    """Records a backward pass.

    Args:
        losses: where it starts: recorded values. The first one tells the block.
        options: keyword arguments of the operation, but for `inputs`.
        inputs: whose gradients it returns: values of this block, weights of the model, tensors of
            the user's, or one of them alone. None for none.
        mark: the user's line.
        kind: the class of the gradients.

    Raises:
        OperationError: if there are no inputs or one of them is something else.
    """
    recording = next(loss for loss in losses if isinstance(loss, AnyRecorded))._recording
    if isinstance(inputs, torch.Tensor | AnyRecorded):
        inputs = [inputs]
    checked: list[Any] = []
    if inputs is not None:
        checked = [_checked(recording, item, mark) for item in inputs]
        if not checked:
            raise OperationError(
                "`inputs=` is empty: name the values and the weights whose gradients are wanted.",
                Location(*mark),
            )
        named = [item for item in checked if not isinstance(item, AnyRecorded)]
        options = {**options, "inputs": named}
    backward = add_node(recording, BACKWARD, tuple(losses), options, mark)
    gradients = _returned(recording, backward, checked, mark)
    if recording.gradients is not None:  # lines that come now may mean this one
        recording.gradients.pop(None, None)
    recording.graph.differentiates = True
    refuse_steps(recording, mark)
    made = BackwardPass(kind(recording, gradient) for gradient in gradients)
    made._recording, made._ref = recording, backward
    return made


def recorded_grad(
    kind: type[Recorded], mark: Mark, outputs: Sequence[Any], inputs: Sequence[Any], **given: Any
) -> BackwardPass:
    """Records `torch.autograd.grad`.

    Args:
        kind: the class of the gradients.
        mark: the user's line.
        outputs: where it starts.
        inputs: what the gradients are of.
        **given: the other arguments of `torch.autograd.grad`.

    Raises:
        OperationError: if it starts from anything that is no value of the run, or is to be of
            several gradients at once.
    """
    if not all(isinstance(output, AnyRecorded) and output._recording.open for output in outputs):
        raise OperationError(
            "In a block `torch.autograd.grad` starts from values of the run: this is the gradient "
            "of something else.",
            Location(*mark),
        )
    if given.get("is_grads_batched"):
        raise OperationError(
            "`is_grads_batched` is not recorded: write a `torch.autograd.grad` for each gradient, "
            "with `retain_graph=True`.",
            Location(*mark),
        )
    gradient = given.get("grad_outputs")
    if isinstance(gradient, Sequence) and len(outputs) == 1:
        (gradient,) = cast("Sequence[Any]", gradient)
    options: dict[str, Any] = {"gradient": gradient, "retain_graph": given.get("retain_graph")}
    for name in ("create_graph", "allow_unused", "materialize_grads"):
        options[name] = given.get(name) or None
    kept = {name: value for name, value in options.items() if value is not None}
    return backward_pass(outputs, {**kept, "accumulate": False}, inputs, mark, kind)


def _checked(recording: Recording, item: Any, mark: Mark) -> Any:
    """One of the inputs of a backward pass: a value, a weight of the model or a tensor."""
    if isinstance(item, AnyRecorded):
        if item._recording is recording:
            if not item._operand:
                refuse_structure(item, Location(*mark))
            return item
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
    return writable(item)


def _returned(recording: Recording, backward: Ref, inputs: Sequence[Any], mark: Mark) -> list[Ref]:
    """The nodes that stand for the gradients of inputs, in their order."""
    found: list[Ref] = []
    named = 0
    for item in inputs:
        if isinstance(item, AnyRecorded):
            found.append(_gradient_of(recording, backward, item))
            continue
        rows = recording.graph.rows
        rows.append((GETITEM, (backward, named), NO_KWARGS, backward.inputs, False, mark))
        found.append(ref(len(rows) - 1))
        named += 1
    return found


def _gradient_of(recording: Recording, backward: Ref, item: Any) -> Ref:
    """The node that stands for the gradient of a value, which is its `.grad` of that pass.

    What has a standard name says itself which value of the run its gradient is a part of.
    """
    around, recording.differentiated = recording.differentiated, backward
    try:
        return item.grad._ref
    finally:
        recording.differentiated = around
