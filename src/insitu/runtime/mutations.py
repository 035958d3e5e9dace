"""Writes in place, and what follows from them for the order of a graph.

Lines mean what they would mean in order on torch tensors, whatever the order in which the model
makes the values. So what stands after a write in place waits for it, if it looks at the same
memory; and what stands before it and is computed later gets a copy of what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from insitu.graph.node import EVERY, Graph, Node, Ref, Site
from insitu.graph.operations import GETITEM, GRAD, READ, REPLACE, WRITE
from insitu.graph.structure import map_structure, tensors_of
from insitu.runtime.memory import HANDING_OVER, Arriving, Key, Memory, held_memory, keys_of, pieces
from insitu.runtime.mixed_steps import refuse_mixed_steps
from insitu.runtime.plan import Mutations, Plan, regroup

if TYPE_CHECKING:
    from insitu.runtime.hooks import Place
    from insitu.runtime.probe import Copies


def order_mutations(
    graph: Graph,
    plan: Plan,
    arriving: Arriving,
    is_view: Callable[[int], bool],
) -> None:
    """Lets what stands after a write in place wait for it. The plan is changed.

    Args:
        graph: what is to be done.
        plan: its plan.
        arriving: gives the memory of what arrives at a site.
        is_view: whether the value of a node shares memory with the values that it is made of.
    """
    known: dict[tuple[int, Memory], Key] = {}
    copies: dict[int, Copies] = {}

    def of_site(site: Site) -> Any:
        return arriving(site, copies.get(site.invocation))

    held = held_memory(graph, of_site, is_view, known)
    memory = list(map(keys_of, held))
    changed = {key for index in graph.mutations for key in memory[graph.rows[index][3][0]]}
    # What is assigned is handed over as a copy. Where else that memory would be seen, another
    # run on fake tensors finds out.
    if any(not changed.isdisjoint(memory[read]) for read in graph.writes):
        copies.update(_copies(graph))
        known.clear()
        held = held_memory(graph, of_site, is_view, known)
        memory = list(map(keys_of, held))
    before, written = _let_wait(graph, plan, memory)
    refuse_mixed_steps(graph, plan, memory)
    if _breaks_aliases(graph, known, of_site, written):
        plan.apart = True
    live = {index for index, keys in enumerate(memory) if not keys.isdisjoint(written)}
    regroup(graph, plan)
    deadlines = {index: _deadlines(graph, index, memory, held) for index in graph.mutations}
    lent = _lent(graph, plan, memory)
    copied = {index for index, node in enumerate(graph) if _holds_constants(node)}
    lasting = {
        index
        for address, index in plan.reads.items()
        if index in live and _may_last(of_site(Site(*address)))
    }
    special = any(before.values()) or lent or copied or lasting or graph.differentiates
    plain = not special and all(
        any(plan.bits[read] == plan.needs[index] for read in reads)
        for index, sets in deadlines.items()
        for reads in sets
    )
    reads = {index for index in live if index in plan.bits}
    plan.mutations = Mutations(reads, deadlines, live, before, lent, copied, lasting, plain)
    plan.special = plan.special or not plain


def _let_wait(
    graph: Graph, plan: Plan, memory: list[frozenset[Key]]
) -> tuple[dict[int, list[tuple[int, int]]], Collection[Key]]:
    """Lets what looks at memory need what the writes before it need.

    Returns:
        `Mutations.before`, and the memory that is written.
    """
    needs = plan.needs
    mutations = set(graph.mutations)
    written: dict[Key, int] = {}  # what the writes so far to a piece of memory need
    users: dict[Key, list[tuple[int, int]]] = {}  # who has looked at it so far, and through what
    before: dict[int, list[tuple[int, int]]] = {}
    for index, node in enumerate(graph):
        if node.operation in (READ, GRAD):
            continue
        # What runs once does not wait for what runs in every step: that comes first.
        repeated = plan.repeated
        ignored = repeated.sites if repeated is not None and index not in repeated.nodes else 0
        for place, source in enumerate(node.inputs):
            needs[index] |= needs[source]
            if node.operation in HANDING_OVER and not place:
                continue  # what something else is to stand for is not looked at
            if node.operation is WRITE and graph.rows[source][0] is REPLACE:
                continue  # of this only the new part, which the node itself has looked at
            for key in _looked_at(node, index, source, memory):
                needs[index] |= written.get(key, 0) & ~ignored
        if index in mutations:
            keys = memory[node.inputs[0]]
            early = [user for key in keys for user in users.get(key, ())]
            before[index] = [u for u in dict.fromkeys(early) if needs[u[0]] & ~needs[index]]
            for key in keys:
                written[key] = written.get(key, 0) | needs[index]
        if node.operation in HANDING_OVER:  # these take the memory, with all that is written to it
            continue
        for source in node.inputs:
            for key in _looked_at(node, index, source, memory):
                users.setdefault(key, []).append((index, source))
    return before, written


def _may_last(arriving: Any) -> bool:
    """Whether what arrives at a site may be memory that outlasts the run."""
    found: list[bool] = [arriving is None]
    map_structure(lambda leaf: found.append(isinstance(leaf, Memory) and leaf.lasting), arriving)
    return any(found)


def _looked_at(node: Node, index: int, source: int, memory: list[frozenset[Key]]) -> frozenset[Key]:
    """The memory of an input that a node has to do with: of a tuple only the part that it takes."""
    part = memory[source] & memory[index] if node.operation is GETITEM else _NOTHING
    return part or memory[source]


_NOTHING: frozenset[Key] = frozenset()


def _deadlines(
    graph: Graph, mutation: int, memory: list[frozenset[Key]], held: list[Any]
) -> list[set[int]]:
    """The reads of the sites through which a write in place reaches the model."""
    target = graph.rows[mutation][3][0]
    reads: set[int] = set()
    pending = [target]
    while pending:
        index = pending.pop()
        node = graph[index]
        pending.extend(s for s in node.inputs if memory[s] & memory[target])
        if node.operation in (READ, GRAD):
            reads.add(index)
    handed_over = (*graph.writes.items(), *graph.skips.items())
    sites = [
        {read} for read, node in handed_over if _given(held[read], held[node]) & memory[target]
    ]
    return [reads, *sites] if reads else sites


def _given(before: Any, after: Any) -> frozenset[Key]:
    """The memory in what stands at a site that is not, at the same place, in what arrived there."""
    if isinstance(before, tuple | list) and isinstance(after, tuple | list):
        pairs = zip(cast("list[Any]", before), cast("list[Any]", after), strict=False)
        return _NOTHING.union(*[_given(one, other) for one, other in pairs])
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        entries = cast("Mapping[Any, Any]", before)
        changed = cast("Mapping[Any, Any]", after)
        return _NOTHING.union(*[_given(entries.get(key), changed[key]) for key in changed])
    return keys_of(after) - keys_of(before)


def _lent(
    graph: Graph, plan: Plan, memory: list[frozenset[Key]]
) -> list[tuple[int, int, frozenset[int]]]:
    """Who waits for other sites with memory of the model's, and which writes to it it is to see."""
    writes: dict[Key, list[int]] = {}
    for mutation in graph.mutations:
        for key in memory[graph.rows[mutation][3][0]]:
            writes.setdefault(key, []).append(mutation)
    found: list[tuple[int, int, frozenset[int]]] = []
    for index, (operation, _, _, inputs, _, _) in enumerate(graph.rows):
        for place, source in enumerate(inputs):
            if operation.in_place and not place:
                continue  # that is written to, and a copy would be in its stead
            seen = {write for key in memory[source] for write in writes.get(key, ())}
            of_model = any(graph.rows[first][0] is READ for first, _ in memory[source])
            if seen and of_model and plan.needs[source] != plan.needs[index]:
                if operation not in HANDING_OVER:
                    seen = {write for write in seen if write < index}
                found.append((index, source, frozenset(seen)))
    return found


def _copies(graph: Graph) -> Mapping[int, Copies]:
    """The places of each invocation from which the model goes on with what is assigned there."""
    copies: dict[int, dict[Place, tuple[Any, ...] | None]] = {}
    for read, write in graph.writes.items():
        site = graph[read].site
        if site is None or site.step not in (0, EVERY):
            continue
        parts: list[Any] = []
        value = graph.rows[write][1][1]
        while type(value) is Ref and graph.rows[value.index][0] in (REPLACE, WRITE):
            operation, args, *_ = graph.rows[value.index]
            if operation is REPLACE:
                parts.append(args[1])
            value = args[1] if operation is WRITE else args[0]
        place = (site.path, site.kind, site.call)
        alone = type(value) is Ref and value.index == read and parts
        copies.setdefault(site.invocation, {})[place] = tuple(parts) if alone else None
    return copies


def _breaks_aliases(
    graph: Graph,
    known: Mapping[tuple[int, Memory], Key],
    of_site: Callable[[Site], Any],
    written: Collection[Key],
) -> bool:
    """Whether a write to a site of one invocation would show in the aliases of another.

    Where one invocation replaces its part of a batch the model goes on with a copy for all, and
    what another has written in place before or writes later is no longer in the same memory.
    """
    invocations = {node.args[0] for node in graph if node.operation is READ}
    for read in graph.writes:
        site = graph[read].site
        for other in invocations if site is not None else ():
            if site is not None and other != site.invocation:
                there = pieces(of_site(site._replace(invocation=other)))
                if any(known.get((other, piece)) in written for piece in there):
                    return True
    return False


def _holds_constants(node: Node) -> bool:
    """Whether a node puts tensors of the user's where they may be written in place."""
    if node.operation not in HANDING_OVER:
        return False
    return bool(tensors_of(node.args))
