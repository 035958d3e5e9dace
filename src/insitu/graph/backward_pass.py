"""What `backward` and `torch.autograd.grad` return in a block: gradients, and a `with`."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

import torch

from insitu.graph.differentiation import record_backward
from insitu.graph.errors import BlockError, OperationError
from insitu.graph.location import Location, Mark, here
from insitu.graph.node import Ref
from insitu.graph.recorded import AnyRecorded
from insitu.graph.recording import Recording


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
    kind: type[AnyRecorded],
) -> BackwardPass:
    """Records a backward pass.

    Args:
        losses: where it starts: recorded values, of which the first tells the block.
        options: as of `record_backward`.
        inputs: likewise, or one of them alone.
        mark: the user's line.
        kind: the class of the gradients.
    """
    first = next(loss for loss in losses if isinstance(loss, AnyRecorded))
    recording = first._recording
    if isinstance(inputs, torch.Tensor | AnyRecorded):
        inputs = [inputs]
    named = None if inputs is None else [*cast("Iterable[Any]", inputs)]
    backward, gradients = record_backward(recording, losses, options, named, mark)
    made = BackwardPass(cast(Any, kind)(recording, gradient) for gradient in gradients)
    made._recording, made._ref = recording, backward
    return made


def recorded_grad(
    kind: type[AnyRecorded], mark: Mark, outputs: Sequence[Any], inputs: Sequence[Any], **given: Any
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
