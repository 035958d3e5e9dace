"""What of a block of a job cannot run, found before it runs: an invocation that fails fails alone.

A job may be made of several, of people who know nothing of each other. So a prompt that the model
cannot take, a write that comes too late, or a value of an earlier block that is not there, takes
only what uses something of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from insitu.engine.dependence import Dependence, Lost
from insitu.engine.failures import FailedInvocations
from insitu.engine.job_parts import JobBlock
from insitu.graph.cells import Missing
from insitu.graph.errors import InsituError, NoValueError
from insitu.graph.expression import expression
from insitu.graph.node import Earlier, Graph
from insitu.graph.renumbering import add_nodes
from insitu.graph.structure import map_structure


class Part(NamedTuple):
    """Some invocations of a block of a job, as a block.

    Attributes:
        block: that block.
        numbers: its invocations, by their numbers in the whole block.
        nodes: its nodes, likewise.
    """

    block: JobBlock
    numbers: Sequence[int]
    nodes: Sequence[int]


def part_of(block: JobBlock, lost: Lost) -> Part:
    """Returns a block without some of its invocations and nodes.

    Args:
        block: the block.
        lost: what is left out.
    """
    numbers = [at for at in range(len(block.prompts)) if at not in lost.invocations]
    own = {number: at for at, number in enumerate(numbers)}
    graph, nodes = Graph([]), [at for at in range(len(block.graph)) if at not in lost.nodes]
    moved = add_nodes(graph, block.graph, nodes, own)
    demanded = block.demanded
    if demanded is not None:
        prompts = [own[number] for number in demanded.prompts if number in own]
        demanded = demanded._replace(prompts=prompts)
    made = replace(
        block,
        prompts=[block.prompts[number] for number in numbers],
        graph=graph,
        saves={moved[at]: name for at, name in block.saves.items() if at in moved},
        demanded=demanded if graph.unfused else None,
    )
    return Part(made, numbers, nodes)


def absent_values(graph: Graph, missing: Callable[[Earlier], Missing | None]) -> dict[int, Any]:
    """Returns the errors for nodes that use values of earlier blocks that are not there.

    Args:
        graph: the graph of a block.
        missing: says why a value is not there, None if it is.
    """
    found: dict[int, InsituError] = {}
    for index, (_, args, kwargs, _, nested, _) in enumerate(graph.rows):
        reasons: list[Missing] = []

        def leaf(item: Any, reasons: list[Missing] = reasons) -> None:
            reason = missing(item) if type(item) is Earlier else None
            if reason is not None:
                reasons.append(reason)

        if nested:
            map_structure(leaf, (args, dict(kwargs)))
        if reasons:
            found[index] = NoValueError(
                f"`{expression(graph, index)}` uses a value of an earlier block that has none: "
                f"{reasons[0].reason}",
                graph[index].location,
            )
    return found


def failing_beforehand(
    block: JobBlock,
    dependence: Dependence,
    lost: Lost,
    check: Callable[[JobBlock], InsituError | None],
) -> list[FailedInvocations]:
    """Returns which invocations of a block cannot run, each with the error that it has alone.

    Args:
        block: the block, which cannot run as it is.
        dependence: which of its nodes and invocations use which.
        lost: what of it is left out already.
        check: returns what is wrong with a block, as far as that is found before it runs.
    """
    everything = range(len(block.prompts))
    left = [number for number in everything if number not in lost.invocations]
    found: list[FailedInvocations] = []

    def wrong_with(numbers: Collection[int]) -> InsituError | None:
        others = [number for number in everything if number not in numbers]
        gone = dependence.lost(lost.nodes, {*lost.invocations, *others})
        return check(part_of(block, gone).block)

    def fails(numbers: Collection[int], error: InsituError) -> None:
        gone = dependence.lost((), numbers)
        own = sorted(gone.invocations)
        found.append(FailedInvocations(error, sorted(numbers), own, gone.nodes))

    def within(groups: Sequence[frozenset[int]]) -> None:
        error = wrong_with(frozenset[int]().union(*groups))
        if error is None:
            return
        if len(groups) > 1:
            before, half = len(found), len(groups) // 2
            within(groups[:half])
            within(groups[half:])
            if len(found) == before:  # each can run, and both together cannot
                fails(frozenset[int]().union(*groups), error)
            return
        (group,) = groups
        before = len(found)
        for number in sorted(group) if len(group) > 1 else ():
            needed = dependence.used_by(number)
            if not any(needed.intersection(one.invocations) for one in found[before:]):
                own = wrong_with(needed)
                if own is not None:
                    fails([number], own)
        if len(found) == before:
            fails(group, error)

    if left:
        within(dependence.groups(left))
    return found
