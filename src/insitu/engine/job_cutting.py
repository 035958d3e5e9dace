"""`cut` and `merge`: several jobs made of a big one, and its results made of theirs.

Between the pieces of a sweep others get their turn. Invocations that use nothing of each other go
apart, neighbours together, for prompts share prefixes within a pass. A few that many others use
are in each piece anew. A generation is not cut: how its rows are padded is the model's to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from insitu.engine.dependence import Lost
from insitu.engine.job import Job
from insitu.engine.job_groups import Group, NodePlaces, Place, Places, groups_of, places_of
from insitu.engine.job_outcome import Failure, Outputs
from insitu.engine.job_parts import JobBlock, earlier_of
from insitu.engine.partial_blocks import part_of, with_earlier
from insitu.engine.results import Results
from insitu.graph.errors import JobError, OptionError
from insitu.graph.location import Location, here
from insitu.graph.operations import BACKWARD, KEEP, SAVE

_Node = tuple[int, int]
"""A node of a job: the number of its block, and its own number in that."""


def cut(job: Job, most: int) -> list[Job]:
    """Makes several jobs of one, that give together what it gives.

    The model is in evaluation mode: where it draws numbers, each piece draws others.

    Args:
        job: the job.
        most: how many invocations a piece has at most. Those that stay together are in one piece
            all the same, and what others use fills half of a piece at most.

    Returns:
        The pieces, for `merge`. The job alone if it cannot be cut, or need not be.

    Raises:
        OptionError: if `most` is less than one.
    """
    if most < 1:
        raise OptionError(f"A piece has one invocation or more, and `most` is {most}.", here())
    if job.parts or _count(job) <= most:
        return [job]
    nodes = places_of(job)
    pieces = _packed(groups_of(job, nodes), most)
    if len(pieces) == 1:
        return [job]
    made: list[Job] = []
    given: set[_Node] = set()
    for held in pieces:
        made.append(_piece(job, nodes, held, given))
    # A line may be of no block in which a piece has a prompt.
    return made if len(given) == sum(len(block.graph) for block in job.blocks) else [job]


def merge(job: Job, pieces: Sequence[Job], results: Sequence[Results]) -> Results:
    """Returns what a job gives, of what its pieces gave: as `model.run(job, raises=False)`.

    Args:
        job: the job.
        pieces: what `cut` made of it, here or in another process.
        results: what running each of them gave, with `raises=False`.

    Raises:
        JobError: if they are no pieces of this job, or not their results.
    """
    if len(results) != len(pieces):
        raise JobError(f"There are {len(pieces)} pieces and {len(results)} results.", here())
    if len(pieces) == 1:
        return results[0]
    nodes = places_of(job)
    groups = groups_of(job, nodes)
    places = _places(_held(groups, [_count(piece) for piece in pieces]))
    found = {name: value for one in results for name, value in one.items()}
    about = job.saves
    outputs: list[Outputs | None] = [None] * len(job.blocks)
    failed = any(one.failed for one in results)
    merged = _Failures(_lines_of_several(job, nodes, groups) if failed else set())
    for own, piece, one in zip(places, pieces, results, strict=True):
        blocks = [at for at, _ in own]
        if len(blocks) != len(piece.blocks) or len(one.outputs) != len(blocks):
            raise JobError("These are not the pieces of this job, or not their results.", here())
        for at, output in zip(blocks, one.outputs, strict=True):
            outputs[at] = output or outputs[at]  # a generation is in one piece
        numbers = dict(own)
        for failure in one.failed:
            at = blocks[failure.block]
            merged.add(failure, at, [numbers[at][number] for number in failure.invocations])
    differences = dict.fromkeys(text for one in results for text in one.differences)
    values = {name: found[name] for name in about if name in found}
    return Results(values, about, outputs, [*differences], merged.ordered(about))


def invocations_of(job: Job, pieces: Sequence[Job]) -> list[list[tuple[int, Sequence[int]]]]:
    """Returns for each block of each piece which block of the job it is, and its invocations.

    Args:
        job: the job.
        pieces: what `cut` made of it.

    Raises:
        JobError: if they are no pieces of this job.
    """
    if len(pieces) == 1:
        return [[(at, range(len(block.prompts))) for at, block in enumerate(job.blocks)]]
    groups = groups_of(job, places_of(job))
    return _places(_held(groups, [_count(piece) for piece in pieces]))


def _places(held: Sequence[Places]) -> list[list[tuple[int, Sequence[int]]]]:
    """The blocks that pieces have invocations of, and the numbers of these, in their order."""
    found: list[list[tuple[int, Sequence[int]]]] = []
    for own in held:
        blocks = sorted({at for at, _ in own})
        found.append([(at, sorted(n for block, n in own if block == at)) for at in blocks])
    return found


def _count(job: Job) -> int:
    return sum(len(block.prompts) for block in job.blocks)


def _packed(groups: Sequence[Group], most: int) -> list[Places]:
    """Puts neighbouring groups into pieces, each with its donors."""
    pieces: list[Places] = []
    held: Places = frozenset()
    donors: Places = frozenset()
    for group in groups:
        more, others = held | group.own | group.donors, donors | group.donors
        if held and len(more) > max(most, 2 * len(others)):
            pieces.append(held)
            more, others = group.own | group.donors, group.donors
        held, donors = more, others
    return [*pieces, held]


def _held(groups: Sequence[Group], counts: Sequence[int]) -> list[Places]:
    """Returns which invocations pieces have, from how many each has.

    Args:
        groups: the groups that were put into pieces.
        counts: how many invocations each piece has.
    """
    found: list[Places] = []
    left = [*reversed(groups)]
    for count in counts:
        held: Places = frozenset()
        while left and len(held) < count:
            group = left.pop()
            held |= group.own | group.donors
        if len(held) != count:
            raise JobError("These are not the pieces of this job.", here())
        found.append(held)
    if left:
        raise JobError("These are not all pieces of this job.", here())
    return found


def _piece(job: Job, nodes: Sequence[NodePlaces], held: Places, given: set[_Node]) -> Job:
    """Returns a piece of a job.

    Args:
        job: the job.
        nodes: which invocations its nodes go with.
        held: the invocations of the piece.
        given: the nodes that pieces before it have. Its own are added.
    """
    kept = _kept(job, nodes, held, given)
    blocks: list[JobBlock] = []
    numbers: list[int] = []
    moved: list[Mapping[int, int]] = []
    for at, block in enumerate(job.blocks):
        numbers.append(len(blocks))
        own = {number for one, number in held if one == at}
        if not own:
            moved.append({})
            continue
        others = frozenset(number for number in range(len(block.prompts)) if number not in own)
        without = frozenset(index for index in range(len(block.graph)) if index not in kept[at])
        part, rest = part_of(block, Lost(without, others))
        saves = {n: one for n, one in part.saves.items() if (at, rest.nodes[n]) not in given}
        # Values of earlier blocks are named by block and node, which have other numbers in the
        # piece.
        graph = with_earlier(part.graph, numbers, moved)
        blocks.append(replace(part, graph=graph, saves=saves))
        moved.append(rest.moved)
    given |= {(at, index) for at, own in enumerate(kept) for index in own}
    return Job(job.model, blocks)


def _kept(job: Job, nodes: Sequence[NodePlaces], held: Places, given: set[_Node]) -> list[set[int]]:
    """Returns the nodes of each block that a piece has.

    What a piece before it has is left out, unless it uses that: lines outside of invocations, and
    saved values. Other lines of a donor stay, for if one fails, all that uses the donor does.
    """
    kept: list[set[int]] = [set() for _ in job.blocks]
    used = set[_Node]()
    there = {at for at, _ in held}
    # From the last block back: what a later one uses is needed in those before it.
    for at in sorted(there, reverse=True):
        graph, of = job.blocks[at].graph, nodes[at]
        # What the model is given is used.
        used.update((at, made) for made in (*graph.writes.values(), *graph.skips.values()))
        for index in range(len(graph) - 1, -1, -1):
            row, node = graph.rows[index], (at, index)
            if not of.needed[index] <= held:
                continue
            # Gradients do not name the backward pass that they are of, so it counts as used.
            outside = of.scopes[index] is None and row[0] is not BACKWARD
            if (outside or row[0] in (SAVE, KEEP)) and node in given and node not in used:
                continue
            kept[at].add(index)
            used.update((at, source) for source in row[3])
            used.update((item.block, item.node) for item in earlier_of(row))
    return kept


_Line = tuple[int, str]


def _line(location: Location) -> _Line:
    """A line, however the file is called in which it is."""
    return location.line, location.text


def _lines_of_several(job: Job, nodes: Sequence[NodePlaces], groups: Sequence[Group]) -> set[_Line]:
    """The lines outside of invocations that several pieces may have."""
    donors = frozenset[Place]().union(*(group.donors for group in groups))
    return {
        _line(Location(*row[5]))
        for block, of in zip(job.blocks, nodes, strict=True)
        for row, places, number in zip(block.graph.rows, of.needed, of.scopes, strict=True)
        if number is None and places <= donors
    }


class _Failures:
    """What failed in pieces, with the numbers of the job: what failed in several is told once.

    Args:
        shared: the lines outside of invocations that several pieces may have.
    """

    def __init__(self, shared: set[_Line]) -> None:
        self._shared = shared
        self._found: list[Failure] = []
        self._alike: dict[Any, list[int]] = {}  # failures that say the same

    def add(self, failure: Failure, block: int, invocations: Sequence[int]) -> None:
        """Adds one.

        Args:
            failure: the failure.
            block: the number of its block in the job.
            invocations: the numbers of its invocations there.
        """
        error = failure.error
        shared = error.location is not None and _line(error.location) in self._shared
        alike = self._alike.setdefault((block, type(error), str(error)), [])
        for at in alike:
            before = self._found[at]
            if shared or not {*before.invocations}.isdisjoint(invocations):
                every = sorted({*before.invocations, *invocations})
                names = [*dict.fromkeys((*before.names, *failure.names))]
                self._found[at] = replace(before, invocations=every, names=names)
                return
        alike.append(len(self._found))
        self._found.append(replace(failure, block=block, invocations=invocations))

    def ordered(self, names: Mapping[str, object]) -> list[Failure]:
        """Returns them in the order of blocks and of invocations, lines outside of those last.

        Args:
            names: the names of all saved values, in their order.
        """
        order = {name: at for at, name in enumerate(names)}
        found = [
            replace(one, names=sorted(one.names, key=lambda name: order.get(name, 0)))
            for one in self._found
        ]
        return sorted(found, key=lambda one: (one.block, *(one.invocations[:1] or [1 << 62])))
