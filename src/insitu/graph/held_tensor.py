"""A tensor of the user's own that lines use, and whether it is still as it was at its line."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import NamedTuple

import torch

from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark
from insitu.graph.structure import sample_of


class Held(NamedTuple):
    """A tensor of the user's own that lines use.

    Attributes:
        tensor: the tensor. It is kept, so that no other gets its identity.
        version: how often it had been written into; some of its numbers where nobody counts that;
            None where nothing is to be compared.
        kept: what the graph holds: the tensor itself, or a copy.
        mark: the user's line.
        written: whether the run writes into it.
    """

    tensor: torch.Tensor
    version: int | bytes | None
    kept: torch.Tensor
    mark: Mark
    written: bool = False

    def check(self) -> None:
        """Raises if it is held by reference and has changed.

        Raises:
            OperationError: naming the line.
        """
        if self.version is None or self.kept is not self.tensor:
            return
        is_counted = isinstance(self.version, int)
        if self.version != (self.tensor._version if is_counted else sample_of(self.tensor)):
            size = " x ".join(map(str, self.tensor.shape)) or "one number"
            raise OperationError(
                f"A tensor of yours ({size}) was written into after this line, and a block runs "
                "when it ends: give this line its own, such as `tensor.clone()`, or write into it "
                "after the block.",
                Location(*self.mark),
            )
