"""Which nodes of a graph can run at which moment of the run.

A node can run once everything that arrives at the sites that it depends on has arrived. Nodes
that depend on the same set of sites run together, in the order of their lines, so the plan keeps
one group for each such set. A set of sites is written as an integer with a bit for each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from insitu.engine.copies import reusable
from insitu.engine.draws import drawing_nodes
from insitu.engine.gradient_binding import Backward, Path, bound_to, joined, place_of
from insitu.graph.errors import CausalityError, OperationError
from insitu.graph.expression import expression
from insitu.graph.location import Mark
from insitu.graph.node import EVERY, Address, Function, Graph, Kind, Ref, Site
from insitu.graph.operations import APPLY, ARITHMETIC, BACKWARD, GRAD, PUT, READ, Operation

Readers = dict[tuple[str, Kind, int, int], Sequence[tuple[int, int]]]
"""The nodes that read what passes a place in a step, each with its invocation."""

# So many that the count never reaches zero: the last step must find the value too.
_MANY = 1 << 40  # uses of a value that is there for every step


@dataclass(slots=True, eq=False)
class Repeated:
    """The part of a graph that runs anew in every step.

    Attributes:
        sites: its sites, as a set of bits.
        nodes: the indices of its nodes.
        saves: those of them whose values the user keeps, one a step.
        joint: those of them that use values of several invocations, with their numbers: these take
            their steps together.
    """

    sites: int
    nodes: list[int]
    saves: list[int]
    joint: list[tuple[int, frozenset[int]]]


@dataclass(slots=True, eq=False)
class Gradients:
    """What backward passes a graph has.

    Attributes:
        bound: the nodes that stand for gradients of each backward pass, by its node.
        wanted: the nodes that stand for gradients of each value, by its node.
        renewed: the values that are made new tensors, by their nodes: which entries of them, each
            with a node that stands for its gradient.
        losses: where backward passes start, of what stands at a site or is a view of that.
        joint: the backward passes in their order, together those that run as one.
        opaque: whether a Python function is called, which may use any tensors that require one.
        constants: the nodes among whose constants are tensors that require a gradient; None before
            the first run.
        overwritten: whether the model was seen to write into what was made a new tensor, or into
            something in the same memory; None before the first run.
    """

    bound: dict[int, list[int]]
    wanted: dict[int, list[int]]
    renewed: dict[int, dict[Path, int]]
    losses: Collection[int]
    joint: Sequence[Backward]
    opaque: bool
    constants: Sequence[int] | None = None
    overwritten: bool | None = None


@dataclass(slots=True, eq=False)
class Plan:
    """What of a graph runs when, and how long its values live.

    Attributes:
        reads: the index of the node that reads it, for each site by its address, in the order of
            their bits.
        bits: the bit of the site that a node reads, by the node's index.
        groups: node indices in the order of their lines, for each set of sites.
        uses: how many times each node's value is asked for, by the run or by the user.
        start: what stands for the beginning of the run, like a node that reads a site, if there are
            nodes that wait for no site.
        writes: for each site that is written, the node that makes what the model gets there, by
            the index of the node that reads what arrives.
        skips: for each module call that is skipped, the node that makes what stands for its
            output, by the index of the node that reads its arguments.
        stops: the lines that end the run, by the node that reads the output after which.
        unshared: those of the written sites whose new value is certainly a tensor in memory that
            nothing else has, by the node that reads what arrives.
        after: the nodes that read in one step what stands at a site written in every step, and
            the nodes that read it there.
        needs: the set of sites that each node depends on.
        held: for each set of sites, the nodes whose values wait for sites that are not in it.
        reused: the writes in place that go on with the copy that an earlier one has made, and the
            operations that do so.
        gradients: which backward passes there are, if any.
        repeated: what runs anew in every step, if anything does.
        crosses: whether a value that is written depends on sites other than its own.
        special: whether there is more to do at sites than to read and to write them.
        plain: whether there is nothing to do but to read, once, and to compute with what was read
            at one site each.
        moves: whether copies of values go to devices other than their own.
        drawing: the nodes that may draw random numbers, each with the invocations that it is made
            of.
        returned: what modules that are skipped would return, as fake tensors, by the node that
            reads their arguments. Who makes the plan adds it.
        readers: what passes found out about who reads what in them, by their invocations.
    """

    reads: dict[Address, int]
    bits: dict[int, int]
    groups: dict[int, list[int]]
    uses: list[int]
    writes: Mapping[int, int]
    needs: list[int]
    held: dict[int, list[int]]
    skips: Mapping[int, int]
    stops: Mapping[int, Mark]
    after: Mapping[int, int]
    start: int | None = None
    unshared: Collection[int] = ()
    reused: Mapping[int, Operation] | None = None
    gradients: Gradients | None = None
    repeated: Repeated | None = None
    crosses: bool = False
    special: bool = False
    plain: bool = False
    moves: bool = False
    drawing: Mapping[int, Collection[int]] = field(default_factory=dict[int, Collection[int]])
    returned: Mapping[int, Any] = field(default_factory=dict[int, Any])
    readers: dict[tuple[int, ...], tuple[Readers, bool]] = field(
        default_factory=dict[tuple[int, ...], tuple[Readers, bool]]
    )
    _places: dict[int, Address] | None = None

    @property
    def places(self) -> Mapping[int, Address]:
        """The address of each site, by its bit."""
        if self._places is None:
            self._places = {self.bits[index]: address for address, index in self.reads.items()}
        return self._places

    def only_skips(self, index: int) -> bool:
        """Returns whether what a module is called with is asked for only because it is skipped.

        Args:
            index: the node that reads that.
        """
        return index in self.skips and self.uses[index] == 1


def make_plan(graph: Graph, saves: Mapping[int, object]) -> Plan:
    """Returns the plan of a graph.

    Args:
        graph: the recorded experiment. A site is read by at most one of its nodes.
        saves: holds the indices of the nodes whose values the user keeps.

    Raises:
        OperationError: if values of every step are used where there is only one step, or there is
            no backward pass for a gradient.
        CausalityError: if something is to run in every step that needs a later one, or the model
            would have to wait for a gradient.
    """
    reads: dict[Address, int] = {}
    bits: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    held: dict[int, list[int]] = {}
    grads: list[int] = []
    backwards: list[int] = []
    rows = graph.rows
    uses = [0] * len(rows)
    needs = [0] * len(rows)
    for index, (operation, args, _, inputs, _, _) in enumerate(rows):
        if operation is GRAD or operation is BACKWARD:  # others wait for it, as for a site
            needs[index] = bits[index] = 1 << len(bits)
            (grads if operation is GRAD else backwards).append(index)
            if operation is BACKWARD:
                for source in inputs:
                    uses[source] += 1
            continue
        # Most nodes have one input, and planning is paid for by each new block.
        if len(inputs) == 1:
            source = inputs[0]
            uses[source] += 1
            need = needs[source]
        elif operation is READ:
            needs[index] = bits[index] = 1 << len(bits)
            reads[args] = index
            continue
        else:
            need = 0
            for source in inputs:
                need |= needs[source]
                uses[source] += 1
            for source in inputs:
                # It has to be kept until the other sites have come, and the model may write into
                # its memory before that.
                if needs[source] != need:
                    held.setdefault(needs[source], []).append(source)
        needs[index] = need
        if need in groups:
            groups[need].append(index)
        else:
            groups[need] = [index]
    start = None
    if 0 in groups:
        start = len(rows)
        bits[start] = 0
        uses.append(0)
    moves = False
    # A save is a use by the user, which never ends.
    for index in saves:
        uses[index] += 1
        # A save with a device copies while the model goes on: the run has to wait for these copies
        # in the end.
        moves = moves or len(rows[index][1]) > 1
    skips, stops, after = graph.skips, graph.stops, graph.after
    plan = Plan(reads, bits, groups, uses, graph.writes, needs, held, skips, stops, after)
    plan.moves, plan.start = moves, start
    drawing = drawing_nodes(rows)
    if drawing:
        invocations = graph.invocations()
        plan.drawing = {index: invocations[index] for index in drawing}
    for index in graph.writes.values():
        uses[index] += 1
        # More than one bit: the value needs a site beside its own, so that order matters.
        if needs[index] & (needs[index] - 1):
            plan.crosses = True
    if skips or stops or after:
        plan.special = True
        for index in skips.values():
            uses[index] += 1
    if graph.differentiates:
        plan.gradients = _gradients(graph, grads, backwards)
        _check_gradients(graph, plan, (*grads, *backwards))
    sites = 0
    for address, index in reads.items():
        if address[4] == EVERY:
            sites |= bits[index]
    if sites:
        plan.repeated = _repeated(graph, plan, saves, sites)
    puts = sum(row[0] is PUT for row in rows)
    if puts > 1 and not graph.differentiates:
        # Autograd needs the values from before a write, so copies are not shared there.
        plan.reused = reusable(graph, needs)
    # Only in the plain case it is certain that nobody else holds the tensor: elsewhere the write is
    # copied.
    if not (sites or plan.special or graph.differentiates):
        plan.unshared = [read for read in graph.writes if _is_unshared(graph, plan, read)]
    more = graph.writes or held or sites or plan.special or graph.differentiates
    plan.plain = not (more or plan.reused)
    return plan


def written(graph: Graph, plan: Plan) -> list[Address]:
    """Returns the sites that are written, in place or not.

    Args:
        graph: the recorded experiment.
        plan: its plan.
    """
    found: list[Address] = []
    for index in plan.writes:
        operation, address, *_ = graph.rows[index]
        if operation is READ:
            found.append(address)
    return found


def _is_unshared(graph: Graph, plan: Plan, read: int) -> bool:
    """Whether a value written to a site is certainly a tensor in memory that nothing else has."""
    write = graph.writes[read]
    if graph.rows[write][0] is PUT:
        return _is_copy(graph, plan, write, read)
    # Arithmetic with a float makes a tensor in new memory, and nobody else uses that one.
    source = graph.rows[write][1][1]
    if type(source) is not Ref or plan.uses[write] > 1 or plan.uses[source.index] > 1:
        return False
    operation, args, *_ = graph.rows[source.index]
    # Not with an integer or a value of the run: what it is added to may be a tuple.
    return operation in ARITHMETIC and any(
        type(arg) is float or (type(arg) is torch.Tensor and arg.is_floating_point())
        for arg in args
    )


def _is_copy(graph: Graph, plan: Plan, put: int, read: int) -> bool:
    """Whether writes in place have made a copy of what arrived, and nothing else uses that."""
    # A chain of writes into the same copy: only the first one copied.
    while graph.rows[put][0] is PUT and plan.uses[put] == 1:
        put = graph.rows[put][3][0]
    return put == read


def _gradients(graph: Graph, grads: list[int], backwards: list[int]) -> Gradients:
    """Finds which gradients there are, with their values and backward passes."""
    wanted: dict[int, list[int]] = {}
    renewed: dict[int, dict[Path, int]] = {}
    for index in grads:
        source = graph.rows[index][3][0]
        wanted.setdefault(source, []).append(index)
        base, path = place_of(graph, source)
        renewed.setdefault(base, {}).setdefault(path, index)
    starts = {arg.index for index in backwards for arg in graph.rows[index][1]}
    losses = [node for node in starts if graph.rows[place_of(graph, node)[0]][0] is READ]
    bound, joint = bound_to(graph, grads, backwards), joined(graph, backwards)
    opaque = any(row[0] is APPLY and isinstance(row[1][0], Function) for row in graph.rows)
    return Gradients(bound, wanted, renewed, losses, joint, opaque)


def _check_gradients(graph: Graph, plan: Plan, late: Sequence[int]) -> None:
    """Raises if there are gradients that cannot be had.

    Args:
        graph: the recorded experiment.
        plan: its plan.
        late: the nodes that come after the model has run.
    """
    after = sum(plan.bits[index] for index in late)
    for read, write in (*graph.writes.items(), *graph.skips.items()):
        if graph[read].operation is READ and plan.needs[write] & after:
            raise CausalityError(
                f"`{expression(graph, read)}` is given a value that depends on a gradient, and "
                "gradients come when the model has run.",
                graph[write].location,
            )
    # A backward pass runs when all steps have ended: the values of a step are gone by then.
    every = sum(plan.bits[index] for address, index in plan.reads.items() if address[4] == EVERY)
    for index in late:
        if any(plan.needs[source] & every for source in graph.rows[index][3]):
            raise OperationError(
                f"`{expression(graph, index)}` cannot be in `every_step`: take single steps.",
                graph[index].location,
            )


def _repeated(graph: Graph, plan: Plan, saves: Mapping[int, object], sites: int) -> Repeated:
    """Finds what runs anew in every step, and lets it keep what comes from outside."""
    nodes = [index for index, need in enumerate(plan.needs) if need & sites]
    places = plan.places
    joint: list[tuple[int, frozenset[int]]] = []
    for index in nodes:
        needed = [places[bit] for bit in places if plan.needs[index] & bit]
        if not graph.repeats_node(index):
            raise OperationError(
                f"`{expression(graph, index)}` uses values of every step: write it inside the "
                "`every_step` block, or save them there.",
                graph[index].location,
            )
        of = frozenset(address[0] for address in needed if address[4] == EVERY)
        if len(of) > 1:
            joint.append((index, of))
        for address in needed:
            # Nodes of every step begin to run in the first one.
            if address[4] > 0:
                raise CausalityError(
                    f"`{expression(graph, index)}` runs in every step, and `{Site(*address)}` is "
                    "not there yet in the first.",
                    graph[index].location,
                )
        for source in graph.rows[index][3]:
            if not plan.needs[source] & sites:
                plan.uses[source] += _MANY
    return Repeated(sites, nodes, [index for index in nodes if index in saves], joint)
