"""Which writes are possible: a value must be there before the model needs it.

Inside a pass the order is that of the model's modules. Passes that run apart are put into the
order in which they need values of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from insitu.graph.errors import CausalityError, NeverRanError, OperationError
from insitu.graph.expression import expression
from insitu.graph.location import Location
from insitu.graph.node import SEPARATOR, Address, Graph, Kind, Site
from insitu.graph.operations import READ
from insitu.runtime.plan import Plan

if TYPE_CHECKING:
    from insitu.graph.node import Place
    from insitu.runtime.passes import Pass


def pass_order(graph: Graph, plan: Plan, passes: Sequence[Pass]) -> list[int]:
    """Returns the numbers of passes, each after those whose values its writes need.

    Raises:
        CausalityError: if two of them need each other's.
    """
    home = _homes(plan, passes)
    sorter: TopologicalSorter[int] = TopologicalSorter(dict.fromkeys(range(len(passes)), ()))
    for reads, write in handed_over(plan):
        for read in reads:
            if graph[read].operation is not READ:
                continue
            target = _address(graph, read)
            for other in needed(plan, read, write):
                if home[other] != home[target]:
                    sorter.add(home[target], home[other])
    try:
        return list(sorter.static_order())
    except CycleError as error:
        cycle = set(error.args[1])
        write = next(
            write
            for reads, write in handed_over(plan)
            for read in reads
            if graph[read].operation is READ and home[_address(graph, read)] in cycle
        )
        apart = next((single.apart for single in passes if single.apart is not None), None)
        why = (
            "with this model and what each of them asks for, such as a gradient, `skip` or `stop`, "
            "they cannot run as one batch"
        )
        if apart is not None and apart.site is not None:
            why = f"what arrives at `{apart.site}` cannot be cut out of a batch"
        elif apart is not None:
            why = f"they cannot run as one batch ({apart.why})"
        raise CausalityError(
            f"Invocations of this block need values of each other, but {why}, so one of them "
            "would have to run first.",
            graph[write].location,
        ) from None


def check_order(
    graph: Graph,
    plan: Plan,
    passes: Sequence[Pass],
    order: Callable[[int], Mapping[Place, int] | None],
) -> None:
    """Finds, before the model runs, writes that need what comes later in the same pass.

    Args:
        graph: what is to be done.
        plan: its plan.
        passes: the passes that it runs in.
        order: gives the moments at which the sites of an invocation come, or None if they are not
            known without a run. Then the pass itself finds out.

    Raises:
        CausalityError: if there is one.
    """
    dependent = [
        (reads, write)
        for reads, write in handed_over(plan)
        if plan.needs[write] & ~sum(plan.bits[read] for read in reads)
    ]
    if not dependent:  # what is written was made of what arrived there: nothing to look up
        return
    home = _homes(plan, passes)
    for reads, write in dependent:
        if any(graph[read].operation is not READ for read in reads):
            continue  # gradients: their order is that of the backward pass
        targets = {read: _address(graph, read) for read in reads}
        moments = order(next(iter(targets.values())).invocation)
        known = {read: _moment(target, moments) for read, target in targets.items()}
        if None in known.values():
            continue
        read = max(reads, key=lambda read: known[read] or _NEVER)
        own, target = known[read] or _NEVER, targets[read]
        others = [
            other
            for other in needed(plan, read, write)
            if home[other] == home[target] and not _together(other, target)
        ]
        late = {plan.reads[o] for o in others if (_moment(o, moments) or _NEVER) > own}
        if late:
            raise causality_error(graph, plan, read, write, late)


def _together(one: Address, other: Address) -> bool:
    """Whether two sites are one place, or both what a module is called with."""
    arguments = ("input", "inputs")
    same_kind = one[2] == other[2] or (one[2] in arguments and other[2] in arguments)
    return same_kind and one[1] == other[1] and one[3:] == other[3:]


def _moment(address: Address, moments: Mapping[Place, int] | None) -> tuple[float, float] | None:
    """When a site comes: its step, and its place in the step; None if that is not known."""
    _, path, kind, call, step = address
    within = {"choice": math.inf, "tokens": math.inf}.get(kind)
    if within is None and moments is not None:
        within = moments.get((path, kind, call))
    if within is None:
        return None
    # What is read in every step is there in the first.
    return (max(step, 0) + (kind == "tokens") / 2, within)


_NEVER = (math.inf, math.inf)


def check_cuts(
    graph: Graph, plan: Plan, order: Callable[[int], Mapping[Place, int] | None]
) -> None:
    """Finds, before the model runs, reads of what is skipped or comes after the end of the run.

    Args:
        graph: what is to be done.
        plan: its plan.
        order: as of `check_order`.

    Raises:
        NeverRanError: if there is one.
    """
    for read in plan.skips:
        skipped = _address(graph, read)
        for address, index in plan.reads.items():
            inside = (
                address[1].startswith((f"{skipped.path}.", f"{skipped.path}{SEPARATOR}"))
                and address[4] == skipped.step
            )
            if inside and address[0] == skipped.invocation:
                raise NeverRanError(
                    f"`{Site(*address)}` has no value, because `skip` lets `{skipped.owner}` not "
                    f"run, at\n{graph[plan.skips[read]].location}\nIt is used at",
                    graph[index].location,
                )
    for read, mark in plan.stops.items():
        last = _address(graph, read)
        moments = order(last.invocation)
        end = _moment(last, moments)
        for address, index in plan.reads.items():
            moment = _moment(address, moments)
            if address[0] == last.invocation and end and moment and moment > end:
                raise NeverRanError(
                    f"`{Site(*address)}` has no value, because the run ends after "
                    f"`{last.owner}`, by `stop` at\n{Location(*mark)}\nIt is used at",
                    graph[index].location,
                )


def unexcused(graph: Graph, plan: Plan, missing: Collection[int]) -> int | None:
    """Returns the first read of what never came that something other than optional saves is for.

    Args:
        graph: what was to be done.
        plan: its plan.
        missing: the nodes that read what never came.
    """
    used = {source for node in graph for source in node.inputs}
    required = {*plan.writes.values(), *plan.skips.values()}
    for index in sorted(missing):
        for node, need in enumerate(plan.needs):
            ends = node in required or (node not in used and node not in graph.optional)
            if ends and need & plan.bits[index]:
                return index
    return None


def causality_error(
    graph: Graph, plan: Plan, read: int, write: int, late: Collection[int]
) -> CausalityError:
    """Returns the error for a write, or a skip, that needs what comes after it.

    Args:
        graph: what is to be done.
        plan: its plan.
        read: the node that reads the site that is written, or the arguments of what is skipped.
        write: the write or the skip.
        late: the nodes that read what comes too late.
    """
    source = graph[min(late)]
    return CausalityError(
        f"`{expression(graph, read)}` is given a value that depends on "
        f"`{expression(graph, min(late))}`, which comes "
        f"later in the run and is read at\n{source.location}\nA write can only use what is there "
        f"when the model passes the site; it stands at",
        graph[write].location,
    )


def needed(plan: Plan, read: int, write: int) -> list[Address]:
    """Returns the sites other than its own that a write needs.

    Args:
        plan: the plan.
        read: the node that reads the site.
        write: the node that makes what is written there.
    """
    mask = plan.needs[write] & ~plan.bits[read]
    found: list[Address] = []
    while mask:
        bit = mask & -mask
        mask ^= bit
        if bit in plan.places:
            found.append(plan.places[bit])
    return found


def handed_over(plan: Plan) -> list[tuple[Collection[int], int]]:
    """Returns what changes the run: the nodes that read the sites where, and the one that does.

    It must be done when the model goes on from the last of the sites.
    """
    return [((read,), node) for read, node in (*plan.writes.items(), *plan.skips.items())]


def uses(
    graph: Graph, plan: Plan, order: Callable[[int], Mapping[Place, int] | None]
) -> dict[tuple[int, int], bool]:
    """Returns which invocations write values of which others, and whether one pass would do.

    Those of which a node of every step uses values take their steps together.

    Args:
        graph: what is to be done.
        plan: its plan.
        order: as of `check_order`.
    """
    found: dict[tuple[int, int], bool] = {}
    if plan.repeated is not None:
        for _, together in plan.repeated.joint:
            found.update({(one, other): True for one in together for other in together})
    if not plan.crosses and not plan.skips:
        return {pair: shares for pair, shares in found.items() if pair[0] != pair[1]}
    moments = cache(order)
    for reads, write in handed_over(plan):
        for read in reads:
            if graph[read].operation is not READ:
                continue
            target = _address(graph, read)
            for source in needed(plan, read, write):
                pair = source[0], target[0]
                here = _moment(_bound(target, "inputs"), moments(target[0]))
                there = _moment(_bound(source, "output"), moments(source[0]))
                shares = here is None or there is None or there <= here or _together(source, target)
                found[pair] = found.get(pair, True) and shares
    return {pair: shares for pair, shares in found.items() if pair[0] != pair[1]}


def _bound(address: Address, bound: Kind) -> Address:
    """A site; of a function in a module's forward, what bounds its moment."""
    owner, inside, _ = address[1].partition(SEPARATOR)
    return (address[0], owner, bound, 0, address[4]) if inside else address


def check_steps(graph: Graph, plan: Plan, passes: Sequence[Pass]) -> None:
    """Raises if values of every step are used together and their invocations run apart.

    Args:
        graph: what is to be done.
        plan: its plan.
        passes: the passes that it runs in.

    Raises:
        OperationError: if there are such.
    """
    if plan.repeated is None or not plan.repeated.joint or len(passes) == 1:
        return
    shared = [single.cuts.keys() for single in passes]
    for index, together in plan.repeated.joint:
        if not any(numbers >= together for numbers in shared):
            apart = next((single.apart.why for single in passes if single.apart is not None), None)
            raise OperationError(
                f"`{expression(graph, index)}` uses values of every step of several invocations, "
                "which do not take their steps together here"
                f"{'' if apart is None else f' ({apart})'}: read single steps.",
                graph[index].location,
            )


def _homes(plan: Plan, passes: Sequence[Pass]) -> dict[Address, int]:
    """The pass in which each site is read."""
    whole: dict[int, int] = {}
    home: dict[Address, int] = {}
    for at, single in enumerate(passes):
        if single.reads is None:
            whole.update(dict.fromkeys(single.cuts, at))
        else:
            home.update(dict.fromkeys(single.reads, at))
    for address in plan.reads:
        if address not in home:
            home[address] = whole[address[0]]
    return home


def _address(graph: Graph, read: int) -> Site:
    site = graph[read].site
    assert site is not None
    return site
