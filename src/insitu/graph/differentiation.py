"""Recording derivatives: gradients that are read or written, and backward passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from insitu.graph.location import Mark
from insitu.graph.node import NO_KWARGS, Ref, ref
from insitu.graph.operations import BACKWARD, GRAD, WRITE
from insitu.graph.recorded import AnyRecorded, Recorded

if TYPE_CHECKING:
    from insitu.graph.recording import Recording


def read_gradient(recording: Recording, source: Ref, mark: Mark) -> Ref:
    """Returns what stands for the gradient of a value for lines that come now.

    Args:
        recording: where it is recorded.
        source: the value.
        mark: the user's line.
    """
    if recording.gradients is None:
        recording.gradients = {}
    if recording.views is not None:
        source = recording.views.resolved(source)
    standing = recording.gradients.get(source.index)
    if standing is None:
        rows = recording.graph.rows
        standing = recording.gradients[source.index] = ref(len(rows))
        rows.append((GRAD, (source,), NO_KWARGS, source.inputs, False, mark))
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
    if recording.views is not None:
        source = recording.views.resolved(source)
    standing = read_gradient(recording, source, mark)
    if recording.holds(standing, value):
        return
    original = recording.graph.original(standing.index)
    args = (Recorded(recording, ref(original)), value, False)
    written = recording.apply(WRITE, args, NO_KWARGS, mark)
    recording.graph.writes[original] = written.index
    cast("dict[int, Ref]", recording.gradients)[source.index] = written


def record_backward(
    recording: Recording, loss: AnyRecorded, options: Mapping[str, Any], mark: Mark
) -> None:
    """Records a backward pass.

    Args:
        recording: where it is recorded.
        loss: where it starts.
        options: keyword arguments of `torch.Tensor.backward`.
        mark: the user's line.
    """
    recording.apply(BACKWARD, (loss,), options, mark)
    recording.gradients = None  # lines that come now mean the next one
    recording.graph.differentiates = True
