"""How the run of a block is planned: once for all blocks of its shape.

The parts of a plan are made in `engine/` and `batching/`. Here they are put together, and what
they have to know of a block before the model runs is asked of its graph and of what its
invocations were given. Plans are kept and found again in `running.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from insitu.batching.asked import asked_by
from insitu.batching.causality import check_cuts, check_order
from insitu.batching.demand import Work
from insitu.batching.pass_plan import PassPlan, alone
from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned, summaries
from insitu.engine.eager import is_compiled
from insitu.engine.exclusive import Exclusive
from insitu.engine.fallback import logger
from insitu.engine.model_call import Pass
from insitu.engine.plan import Plan, make_plan
from insitu.engine.probe import Ambient, ambient
from insitu.engine.tree import CallPath, Tree, Watched
from insitu.graph.errors import PathError, ShapeError
from insitu.graph.location import Location
from insitu.graph.node import SEPARATOR, Graph, ModuleRef, Place, Site, WeightRef, readable
from insitu.graph.operations import BACKWARD
from insitu.graph.written_arguments import check_arguments
from insitu.tracing.graph_check import absent
from insitu.tracing.never_ran import never_ran
from insitu.tracing.run import Run


@dataclass(slots=True, eq=False)
class Prepared:
    """How a graph is run. It holds for all graphs of its shape.

    Attributes:
        plan: which nodes run when.
        passes: what each pass does, in their order.
        compiled: whether any of the model's parts is under `torch.compile`.
        tree: the model's tree.
        exclusive: who may use the model.
        path: the part of the tree that the block is about.
        alone: whether it is of one invocation in which no module is skipped: then it depends on
            no other part.
        bare: whether nothing has to be done before its one pass, around it, or after it.
        ambient: the settings of torch on which the dtypes in `plan.returned` depend.
        checks: what blocks of this plan would give and take, as earlier checks have found.
    """

    plan: Plan
    passes: Sequence[PassPlan]
    compiled: bool
    tree: Tree
    exclusive: Exclusive
    path: CallPath
    alone: bool
    bare: bool
    ambient: Ambient
    checks: dict[Hashable, object] = field(default_factory=dict[Hashable, object])


def _watched(model: Subject, graph: Graph, plan: Plan) -> Watched:
    """The part of the tree that a block is about. All of it has to be there."""
    modules = model.snapshot.modules
    paths: dict[str, int] = {}
    # The values of steps have no module of their own.
    for (_, path, kind, *_), index in plan.reads.items():
        if kind in ("output", "input", "inputs"):
            paths.setdefault(path.partition(SEPARATOR)[0], index)
    # A module may be called as a function, outside of the model's flow.
    for index, (_, args, *_) in enumerate(graph.rows):
        if args and type(args[0]) is ModuleRef:
            paths.setdefault(args[0].path, index)
    # Weights that are named in `backward(inputs=)` must be there as well.
    for index, row in enumerate(graph.rows) if graph.differentiates else ():
        for weight in row[2].get("inputs", ()) if row[0] is BACKWARD else ():
            if type(weight) is WeightRef:
                paths.setdefault(_owner(model, weight.path, graph[index].location), index)
    for path, index in paths.items():
        if path not in modules:
            raise absent(path, modules, graph[index].location)
    return model.snapshot.on_the_way(paths)


def _owner(model: Subject, weight: str, location: Location) -> str:
    """The module that a weight is in."""
    path, _, name = weight.rpartition(".")
    owner = model.snapshot.modules.get(path)
    if owner is None or not isinstance(getattr(owner, name, None), nn.Parameter):
        raise PathError(f"The model has no weight {readable(weight)!r} now.", location)
    return path


def plan_run(run: Run) -> tuple[Prepared, list[Pass]]:
    """Plans the run of a block, and returns its passes too.

    Args:
        run: the block.

    Raises:
        InsituError: if something is wrong with the run, as far as that is found beforehand.
    """
    model, procedure, graph, requests = run.model, run.procedure, run.lines.graph, run.requests
    tree = model.snapshot
    check_arguments(graph)
    plan = make_plan(graph, run.lines.saves)
    watched = _watched(model, graph, plan)
    work = Work(graph, plan, asked_by(graph, plan, len(requests)), partial(_moments, run))
    demands = procedure.demands(tree.root, requests, work)
    # Most blocks are of one prompt, and there is nothing to plan in them.
    if len(requests) == 1:
        plans = [alone(0, demands.each[0], [*plan.reads])]
    else:
        from insitu.batching.planner import plan_passes  # takes a while, and one needs none

        plans = plan_passes(work, demands)
        _log(plans, len(requests))
    passes = procedure.passes(tree.root, plans, requests)
    # Only then a value can come too late.
    if plan.crosses or plan.skips:
        check_order(work, plans)
    if plan.skips or plan.stops:
        plan.returned = _returned(run)
        check_cuts(work)
    tree = model.snapshot
    compiled = is_compiled(tree.parts)
    by_itself = len(requests) == 1 and not plan.returned
    beside = compiled or plan.start is not None or plan.gradients is not None or plan.drawing
    bare = by_itself and not beside
    found = (compiled, tree, model.exclusive, CallPath(watched), by_itself, bare, ambient())
    return Prepared(plan, plans, *found), passes


def _log(plans: Sequence[PassPlan], count: int) -> None:
    """Says which invocations have a pass for themselves that could share one otherwise."""
    reasons = Counter(single.apart.why for single in plans if single.apart is not None)
    for why, own in reasons.items():
        logger.info("%d of %d prompts run one by one: %s", own, count, why)


def explained(run: Run) -> Planned:
    """Returns what the passes of a run do, for the user.

    Args:
        run: the block, once it is planned.
    """
    return Planned(summaries(run.passes, run.procedure.facts, partial(_moments, run)))


def _moments(run: Run, invocation: int) -> Mapping[Place, int] | None:
    """When the sites of an invocation come, or None if that is not known without a run."""
    try:
        return run.probe(invocation).moments
    except ShapeError:
        return None


def _returned(run: Run) -> Mapping[int, Any]:
    """What the modules that are skipped would return, as fake tensors."""
    returned: dict[int, Any] = {}
    graph = run.lines.graph
    for read in graph.skips:
        node = graph[read]
        invocation, path, *_ = node.args
        try:
            probe = run.probe(invocation)
        except ShapeError as error:
            raise ShapeError(
                f"`{readable(path)}` cannot be skipped, because it is not known what it "
                f"returns. {error}",
                node.location,
            ) from error
        if path not in probe.returned:
            raise never_ran(graph, run.model.modules, Site(*node.args), probe.seen)
        returned[read] = probe.returned[path]
    return returned
