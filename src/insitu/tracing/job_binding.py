"""Blocks of a job made ready for a model: its procedure, what its prompts are, its lines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from insitu.batching.procedure import Subject
from insitu.engine.job_parts import JobBlock, JobPrompt
from insitu.graph.cells import Cell, Holder
from insitu.graph.location import mark as here_mark
from insitu.graph.node import Carried, Earlier
from insitu.graph.operations import KEEP, SAVE
from insitu.graph.structure import map_structure
from insitu.tracing.graph_check import check_graph
from insitu.tracing.job_making import exchanged
from insitu.tracing.run import HeldLines, Run
from insitu.tracing.site_shapes import SiteShapes


class Kept(Protocol):
    """What later blocks of a job may use of an earlier one."""

    @property
    def saves(self) -> Mapping[int, Holder]:
        """Where the values are that it saves, by the node."""
        ...

    def fake(self, index: int) -> Any:
        """Returns the value of a node with fake tensors."""
        ...


def bind(
    model: Subject,
    block: JobBlock,
    earlier: Sequence[Kept],
    kept: Collection[int] = (),
    numbers: Sequence[int] | None = None,
    dry: bool = False,
) -> Run:
    """Makes a block of a job ready to run.

    Args:
        model: the model.
        block: the block, or a part of one.
        earlier: the blocks before it, whose values it may use.
        kept: the nodes whose values later blocks use.
        numbers: the numbers that its invocations have in the block, if it is a part of one.
        dry: whether it will not run.

    Raises:
        InsituError: if the model cannot take its options or prompts, or lacks what its graph names.
    """
    mark = next((one.mark for one in block.prompts if one.mark is not None), here_mark())
    procedure = model.procedure(block.procedure, block.options, mark, dry)
    requests = [procedure.received(_copied(prompt)) for prompt in block.prompts]
    graph, demanded = block.graph, None
    if block.demanded is not None:
        options, line, prompts = block.demanded
        demanded = options, line
        for number in prompts:
            requests[number] = procedure.demanding(requests[number], options)
    check_graph(graph, model.modules, requests, procedure)

    def leaf(item: Any) -> Any:
        if type(item) is not Earlier:
            return item
        before = earlier[item.block]
        return Carried(before.saves[item.node], lambda: before.fake(item.node))

    if any(row[4] for row in graph.rows):
        graph = exchanged(graph, leaf)
    saves: dict[int, Holder] = {
        index: Cell() for index, row in enumerate(graph.rows) if row[0] in (SAVE, KEEP)
    }
    lines = HeldLines(
        graph,
        saves,
        block.casts,
        block.dtype,
        SiteShapes(model, procedure, requests, graph),
        block.saves,
        len(earlier) + 1,
        kept,
        saves.keys() - block.saves.keys(),
        numbers,
    )
    return Run(model, procedure, lines, requests, demanded)


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
