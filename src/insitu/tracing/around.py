"""What an invocation belongs to: a block, or an edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from insitu.batching.procedure import Procedure
from insitu.graph.recording import Recording


class Around(Protocol):
    """A block or an edit, as far as its invocations need it.

    Attributes:
        model: whose sites its lines are about.
        recording: what its lines are recorded in.
        procedure: how the model runs.
        is_open: whether its `with` block is being executed.
        promises_output: whether `output` is the result of the run and not a proxy.
    """

    model: Any
    recording: Recording
    procedure: Procedure[Any]
    is_open: bool
    promises_output: bool

    def demand(self, invocation: Any, options: Mapping[str, Any]) -> None:
        """Lets one of its invocations run with options that it takes for a value to be there."""
        ...
