"""Which invocations of a job have to stay together when it is cut.

An invocation may use values of others. Those that are used, and use none themselves, are donors:
where they are few, they can be run once more for each part of those that use them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from insitu.engine.dependence import Dependence
from insitu.engine.draws import drawing_nodes
from insitu.engine.job import Job
from insitu.engine.job_parts import JobBlock, earlier_of
from insitu.engine.leaves import has_leaves
from insitu.graph.node import ModuleRef, Row
from insitu.graph.operations import APPLY

Place = tuple[int, int]
"""An invocation of a job: the number of its block, and its own number in that."""

Places = frozenset[Place]

_FEW = 4
"""For how many others there is one donor at least, where donors are run more than once."""


@dataclass(frozen=True, slots=True)
class Group:
    """Invocations that stay together.

    Attributes:
        own: the invocations.
        donors: others whose values they use. Other groups may have the same.
    """

    own: Places
    donors: Places = frozenset()


@dataclass(frozen=True, slots=True)
class NodePlaces:
    """Which invocations the nodes of a block go with.

    Attributes:
        needed: for each node, the invocations that it is computed of, and those in whose `with`
            it stands, or something that it is computed of.
        scopes: for each node, the number of the one in whose `with` it stands, None if in none.
    """

    needed: Sequence[Places]
    scopes: Sequence[int | None]


def places_of(job: Job) -> list[NodePlaces]:
    """Returns which invocations the nodes of each block of a job go with.

    Args:
        job: the job.
    """
    found: list[NodePlaces] = []
    for at, block in enumerate(job.blocks):
        dependence = Dependence(block.graph)
        scopes = dependence.scopes()
        outside = [_earlier_places(row, found) for row in block.graph.rows]
        needed: list[Places] = []
        while True:  # a gradient may stand before the backward pass that it is of
            before, needed = needed, []
            for index, row in enumerate(block.graph.rows):
                own = {(at, number) for number in dependence.invocations([index])}
                number, backward = scopes[index], dependence.passes.get(index)
                if number is not None:
                    own.add((at, number))
                if backward is not None and before:
                    own |= before[backward]
                needed.append(_union([outside[index], own, *(needed[one] for one in row[3])]))
            if not dependence.passes or needed == before:
                break
        found.append(NodePlaces(needed, scopes))
    return found


def groups_of(job: Job, nodes: Sequence[NodePlaces]) -> list[Group]:
    """Returns the invocations of a job in groups, in their order.

    What groups use of each other are their donors. The numbers that donors draw are the same for
    all that use them, so those that draw any stay with them.

    Args:
        job: the job.
        nodes: which invocations its nodes go with.
    """
    everybody = [(at, n) for at, block in enumerate(job.blocks) for n in range(len(block.prompts))]
    needs: dict[Place, set[Place]] = {place: {place} for place in everybody}
    ties: list[Places] = []
    drawing: list[Places] = []
    for at, (block, of) in enumerate(zip(job.blocks, nodes, strict=True)):
        _add_needs(at, block, of, needs, ties)
        drawing += [
            of.needed[index]
            for index in drawing_nodes(block.graph.rows)
            if not _calls_module(block.graph.rows[index])
        ]
    together = [*map(frozenset, needs.values()), *ties]
    if not all(drawing):  # of no invocation, so of all
        return [Group(frozenset(everybody))]
    traces = {at for at, block in enumerate(job.blocks) if block.procedure == "trace"}
    donors = _donors({one: of for one, of in needs.items() if one[0] in traces}, needs)
    apart: dict[Place, Places] = {
        place: group
        for group in _joined([one for one in everybody if one not in donors], together)
        for place in group
    }
    found: list[Group] = []
    for whole in _joined(everybody, together):
        own = whole & donors
        parts = dict.fromkeys(apart[place] for place in sorted(whole - donors))
        # Donors run again in each piece, which pays only where few of them serve many.
        many = len(parts) > 1 and _FEW * len(own) <= len(whole) - len(own)
        if many and not _draw(job, own, drawing):
            found += [Group(part, own) for part in parts]
        else:
            found.append(Group(whole))
    return sorted(found, key=lambda group: min(group.own))


def _add_needs(
    at: int,
    block: JobBlock,
    of: NodePlaces,
    needs: Mapping[Place, set[Place]],
    ties: list[Places],
) -> None:
    """Adds what the invocations of a block use, and which of them have to stay together."""
    graph = block.graph
    for places, number in zip(of.needed, of.scopes, strict=True):
        if number is None:
            ties.append(places)
        else:
            needs[at, number].update(places)
    for read, made in (*graph.writes.items(), *graph.skips.items()):
        for place in of.needed[read]:
            if place[0] == at:
                needs[place].update(of.needed[made])
    meets = graph.differentiates and has_leaves(
        graph, [(prompt.args, prompt.kwargs) for prompt in block.prompts]
    )  # what is added up there
    if block.procedure != "trace" or meets:
        ties.append(frozenset((at, number) for number in range(len(block.prompts))))


def _donors(able: Mapping[Place, Collection[Place]], needs: Mapping[Place, set[Place]]) -> Places:
    """Returns the invocations that others use, and that use none but such themselves.

    Args:
        able: those that may be among them, with what they use.
        needs: what each invocation uses, and itself.
    """
    users: dict[Place, list[Place]] = {}
    for place, used in needs.items():
        for one in used - {place}:
            users.setdefault(one, []).append(place)
    waiting = {one: {*able[one]} - {one} for one in users if one in able}
    ready = [one for one, used in waiting.items() if not used]
    found: set[Place] = set()
    while ready:
        done = ready.pop()
        found.add(done)
        for user in users[done]:
            if user in waiting:
                waiting[user].discard(done)
                if not waiting[user]:
                    ready.append(user)
    return frozenset(found)


def _draw(job: Job, donors: Places, drawing: Iterable[Places]) -> bool:
    """Whether a number that is drawn has to be the same in all runs of some donors."""
    return any(
        places <= donors or any(job.blocks[at].prompts[n].seed is not None for at, n in both)
        for places in drawing
        if (both := places & donors)
    )


def _joined(places: Iterable[Place], together: Iterable[Places]) -> list[Places]:
    """Returns invocations in groups; those that stay together are in one."""
    leader = {place: place for place in places}

    def found(place: Place) -> Place:
        while leader[place] != place:
            leader[place] = place = leader[leader[place]]
        return place

    for one in together:
        first: Place | None = None
        for place in one:
            if place in leader:
                first = found(place) if first is None else first
                leader[found(place)] = first
    groups: dict[Place, list[Place]] = {}
    for place in leader:
        groups.setdefault(found(place), []).append(place)
    return [frozenset(group) for group in groups.values()]


def _earlier_places(row: Row, blocks: Sequence[NodePlaces]) -> Places:
    """The invocations of earlier blocks that a node goes with."""
    found = set[Place]()
    for item in earlier_of(row):
        needed = blocks[item.block].needed[item.node]
        found |= needed
        if all(at != item.block for at, _ in needed):  # a block is there with a prompt only
            found.add((item.block, 0))
    return frozenset(found)


def _calls_module(row: Row) -> bool:
    """Whether a node calls a module of the model, which draws nothing but in training mode."""
    return row[0] is APPLY and isinstance(row[1][0], ModuleRef)


def _union(sets: Iterable[Collection[Place]]) -> Places:
    """All that is in some sets; one of them itself, if nothing is in others."""
    found: Collection[Place] = frozenset()
    for one in sets:
        if not found:
            found = one
        elif one and not (found is one or one == found):
            found = {*found, *one}
    return frozenset(found)
