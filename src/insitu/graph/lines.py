"""What was recorded, as far as a run or a question about shapes needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from insitu.graph.cells import Holder
from insitu.graph.context import Casts
from insitu.graph.node import Graph, Site


class Modules(Protocol):
    """A model, as far as its modules and weights are asked for."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules by path, with or without weights."""
        ...

    def fake_module(self, path: str) -> Callable[..., Any]:
        """Returns a module as a function on fake tensors."""
        ...


class ShapeSource(Protocol):
    """Knows, without running the model, the shapes of what will arrive at its sites."""

    @property
    def model(self) -> Modules:
        """The model."""
        ...

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        ...

    def writer(self) -> int | None:
        """Returns in which invocation the running line stands, None if in none."""
        ...


class Lines(Protocol):
    """What was recorded, as far as a run or a scan of it asks: here, or in another process.

    Attributes:
        graph: the nodes so far.
        saves: where the run has to put saved values, by the index of the node that saves each.
        shapes: gives the shapes at sites; None where no model is behind the recording.
        fakes: fake values of nodes, as far as anybody has asked, by node index.
        casts: where autocast was enabled where the block began.
        dtype: the default dtype there.
        as_first_step: whether sites of later steps count as those of the first, while a question
            is answered to which that makes no difference.
        counting: what counts the operations of fake values, None if nobody wants to know.
    """

    graph: Graph
    saves: dict[int, Holder]
    shapes: ShapeSource | None
    fakes: dict[int, Any]
    casts: Casts
    dtype: torch.dtype
    as_first_step: bool
    counting: AbstractContextManager[Any] | None
