"""Blocks of jobs without some of their invocations and nodes, and with other blocks before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from insitu.engine.dependence import Lost
from insitu.engine.job_parts import JobBlock, earlier_of
from insitu.graph.node import Earlier, Graph
from insitu.graph.renumbering import add_nodes, exchanged


class Rest(NamedTuple):
    """A block without some of its lines.

    Attributes:
        graph: its graph.
        numbers: the invocations that are left, by their numbers in the block.
        nodes: the nodes that are left, by their numbers in the block.
        moved: the number of each of these nodes in the graph of the rest.
    """

    graph: Graph
    numbers: Sequence[int]
    nodes: Sequence[int]
    moved: Mapping[int, int]


def rest_of(graph: Graph, count: int, lost: Lost) -> Rest:
    """Returns a block without some of its invocations and nodes.

    Args:
        graph: what the block has recorded.
        count: how many invocations it has.
        lost: the nodes and invocations that are left out.
    """
    numbers = [number for number in range(count) if number not in lost.invocations]
    nodes = [index for index in range(len(graph)) if index not in lost.nodes]
    own = {number: at for at, number in enumerate(numbers)}
    left = Graph([])
    return Rest(left, numbers, nodes, add_nodes(left, graph, nodes, own))


def part_of(block: JobBlock, lost: Lost) -> tuple[JobBlock, Rest]:
    """Returns a block of a job without some of its invocations and nodes, and its `Rest`.

    Args:
        block: the block.
        lost: the nodes and invocations that are left out.
    """
    rest = rest_of(block.graph, len(block.prompts), lost)
    demanded = block.demanded
    if demanded is not None:
        prompts = [at for at, number in enumerate(rest.numbers) if number in demanded.prompts]
        demanded = demanded._replace(prompts=prompts) if rest.graph.unfused else None
    part = replace(
        block,
        prompts=[block.prompts[number] for number in rest.numbers],
        graph=rest.graph,
        saves={rest.moved[at]: name for at, name in block.saves.items() if at in rest.moved},
        demanded=demanded,
    )
    return part, rest


def with_earlier(graph: Graph, blocks: Sequence[int], moved: Sequence[Mapping[int, int]]) -> Graph:
    """Returns a graph that uses values of earlier blocks where these are now.

    Args:
        graph: the graph of a block.
        blocks: the new number of each block before it. No value is used of those without one.
        moved: the new index of each of their nodes.
    """
    if not any(map(earlier_of, graph.rows)):
        return graph

    def leaf(item: Any) -> Any:
        if type(item) is not Earlier:
            return item
        return Earlier(blocks[item.block], moved[item.block][item.node])

    return exchanged(graph, leaf)
