"""Blocks of a job made ready for a model: its procedure, what its prompts are, its lines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from insitu.batching.procedure import Procedure, Subject
from insitu.engine.job_parts import JobBlock, JobPrompt
from insitu.graph.cells import Cell, Holder
from insitu.graph.context import Casts
from insitu.graph.lines import ShapeSource
from insitu.graph.location import mark as here_mark
from insitu.graph.node import Carried, Earlier, Graph
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.shapes import fake_value
from insitu.graph.structure import map_structure
from insitu.tracing.graph_check import check_graph
from insitu.tracing.job_making import exchanged
from insitu.tracing.site_shapes import SiteShapes


class Place(NamedTuple):
    """Where a block is in its job, or a part of one.

    Attributes:
        order: the place of the block, from 1.
        kept: the nodes whose values later blocks use.
        numbers: the numbers that its invocations have in the block, if it is a part of one.
    """

    order: int = 1
    kept: Collection[int] = ()
    numbers: Sequence[int] | None = None


class JobLines:
    """What a block of a job has recorded, with places for its values: a `Lines`.

    Args:
        graph: the graph.
        shapes: gives the shapes at its sites.
        casts: the autocast that the block began with.
        dtype: the default dtype that it began with.
        names: the names of its saved values, by the node that saves them.
        place: where it is in its job.
    """

    as_first_step = False
    counting: AbstractContextManager[Any] | None = None

    def __init__(
        self,
        graph: Graph,
        shapes: ShapeSource,
        casts: Casts,
        dtype: torch.dtype,
        names: Mapping[int, str],
        place: Place,
    ) -> None:
        self.graph = graph
        self.saves: dict[int, Holder] = {
            index: Cell() for index, row in enumerate(graph.rows) if row[0] in (SAVE, KEEP)
        }
        self.shapes: ShapeSource | None = shapes
        self.fakes: dict[int, Any] = {}
        self.casts = casts
        self.dtype = dtype
        self.names = names
        self.order, self.kept, self.numbers = place
        self.lent = [index for index in self.saves if index not in names]

    def fake(self, index: int) -> Any:
        """Returns the value of a node with fake tensors.

        Args:
            index: the node.
        """
        return fake_value(self, index)


class Kept(Protocol):
    """What later blocks of a job may use of an earlier one."""

    @property
    def saves(self) -> Mapping[int, Holder]:
        """Where the values are that it saves, by the node."""
        ...

    def fake(self, index: int) -> Any:
        """Returns the value of a node with fake tensors."""
        ...


class Bound(NamedTuple):
    """A block of a job, made ready to run on a model.

    Attributes:
        procedure: how it runs.
        lines: what was recorded.
        requests: what its invocations are given.
    """

    procedure: Procedure[Any]
    lines: JobLines
    requests: Sequence[Any]


def bind(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[Kept],
    dry: bool = False,
    place: Place | None = None,
) -> Bound:
    """Makes a block of a job ready to run.

    Args:
        model: the model.
        block: the block.
        earlier: the blocks before it, whose values it may use.
        dry: whether it will not run.
        place: where it is in its job; None for behind those before it.

    Raises:
        InsituError: if the model cannot take its options or prompts, or lacks what its graph names.
    """
    mark = next((one.mark for one in block.prompts if one.mark is not None), here_mark())
    procedure = model.procedure(block.procedure, block.options, mark, dry)
    requests = [procedure.received(_copied(prompt)) for prompt in block.prompts]
    graph = block.graph
    if block.demanded is not None:
        for number in block.demanded.prompts:
            requests[number] = procedure.demanding(requests[number], block.demanded.options)
    check_graph(graph, model.modules, requests, procedure)

    def leaf(item: Any) -> Any:
        if type(item) is not Earlier:
            return item
        lines = earlier[item.block]
        return Carried(lines.saves[item.node], lambda: lines.fake(item.node))

    if any(row[4] for row in graph.rows):
        graph = exchanged(graph, leaf)
    shapes = SiteShapes(model, procedure, requests, graph)
    place = place or Place(len(earlier) + 1)
    lines = JobLines(graph, shapes, block.casts, block.dtype, block.saves, place)
    return Bound(procedure, lines, requests)


def _copied(prompt: JobPrompt) -> JobPrompt:
    """A prompt into which the model may write, and the job stays as it was."""

    def leaf(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        return item if item.requires_grad else item.clone()

    ids, mask, args, kwargs = map_structure(
        leaf, (prompt.ids, prompt.mask, prompt.args, dict(prompt.kwargs))
    )
    return JobPrompt(ids, mask, args, kwargs, prompt.seed, prompt.mark, prompt.steps)
