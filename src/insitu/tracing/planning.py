"""How the run of a block is planned: once for all blocks of its shape, each in its own passes.

The parts of a plan are made in `engine/`. Here they are put together, and what they have to know
of a block before the model runs is asked of its graph and of what its invocations were given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from insitu.batching.asked import asked_by
from insitu.batching.causality import check_cuts, check_order
from insitu.batching.demand import Work
from insitu.batching.pass_plan import PassPlan, alone
from insitu.batching.procedure import Procedure, Subject
from insitu.batching.summary import Summary, summaries
from insitu.engine.ambient import Ambient, ambient
from insitu.engine.call_path import CallPath
from insitu.engine.eager import is_compiled
from insitu.engine.exclusive import Exclusive
from insitu.engine.fallback import logger
from insitu.engine.gradient_checks import check_gradients
from insitu.engine.model_call import Pass
from insitu.engine.plan import Plan, make_plan
from insitu.engine.tree import Tree, Watched
from insitu.graph.errors import BlockError, PathError, ShapeError
from insitu.graph.location import Location, here
from insitu.graph.node import SEPARATOR, Graph, ModuleRef, Place, Site, WeightRef, readable
from insitu.graph.operations import BACKWARD
from insitu.graph.written_arguments import check_arguments
from insitu.tracing.graph_check import absent
from insitu.tracing.never_ran import never_ran

_NOTHING_RETURNED: Mapping[int, Any] = {}


@dataclass(slots=True, eq=False)
class Prepared:
    """How a graph is run: what is found out once for all graphs of its shape.

    Attributes:
        plan: which nodes run when.
        passes: what each pass does, in their order.
        returned: what modules that are skipped would return, as fake tensors, by the node that
            reads their arguments.
        compiled: whether any of the model's parts is under `torch.compile`.
        tree: the model's tree.
        exclusive: who may use the model.
        path: the part of the tree that the block is about.
        alone: whether it is of one invocation in which no module is skipped: then it depends on
            no other part.
        ambient: what settings of torch the dtypes in `returned` depend on.
    """

    plan: Plan
    passes: Sequence[PassPlan]
    returned: Mapping[int, Any]
    compiled: bool
    tree: Tree
    exclusive: Exclusive
    path: CallPath
    alone: bool
    ambient: Ambient


def prepare(
    model: Subject,
    procedure: Procedure[Any],
    graph: Graph,
    saves: Mapping[int, object],
    requests: Sequence[Any],
    module: nn.Module,
    dry: bool = False,
) -> tuple[Prepared, list[Pass | None]]:
    """Plans the run of a block, or finds how one like it was planned, and gives its passes too.

    The passes are the caller's to take out of their list: what they hold goes with them.

    Args:
        model: the model that will run.
        procedure: how it will run.
        graph: what was recorded.
        saves: holds the indices of the nodes whose values are kept.
        requests: what each invocation was given.
        module: the wrapped module.
        dry: whether it will not run.

    Raises:
        InsituError: for what is wrong with the run, as far as that is found beforehand.
    """
    if not requests:
        raise BlockError(
            "The block has no prompt: give it one, or write `with tracer.invoke(prompt):` inside.",
            here(4),
        )
    key, plans = procedure.key(module, requests), model.plans
    prepared: Prepared | None = None
    if key is not None:
        key, prepared = plans.find(key, graph, saves)
        if prepared is not None and not (
            prepared.path.still_holds() and (prepared.alone or _all_holds(prepared, model))
        ):
            prepared = None
    if prepared is None:
        if not dry:
            model.warn_of_noise()
        model.look_at_weights()
        if model.look(closely=True) or model.plans is not plans:
            key, plans = procedure.key(module, requests), model.plans
            if key is not None:
                key, _ = plans.find(key, graph, saves)
        prepared, passes = _planned(model, procedure, graph, saves, requests, module)
        if key is not None:
            plans.keep(key, graph, saves, prepared)
    else:
        passes = procedure.passes(module, prepared.passes, requests)
    return prepared, [*passes]


def _all_holds(prepared: Prepared, model: Subject) -> bool:
    """Whether all of the tree is as it was planned for.

    What may be shared by several invocations depends on that, and so does what a module that is
    skipped would return.
    """
    if prepared.returned and (model.look_at_weights() or prepared.ambient != ambient()):
        return False
    return not (model.snapshot.has_changed() or model.snapshot.runs_otherwise())


def _watched(model: Subject, graph: Graph, plan: Plan) -> Watched:
    """The part of the tree that a block is about, all of which has to be there."""
    modules = model.snapshot.modules
    paths: dict[str, int] = {}
    for (_, path, kind, *_), index in plan.reads.items():
        if kind in ("output", "input", "inputs"):
            paths.setdefault(path.partition(SEPARATOR)[0], index)
    for index, (_, args, *_) in enumerate(graph.rows):
        if args and type(args[0]) is ModuleRef:
            paths.setdefault(args[0].path, index)
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


def _planned(
    model: Subject,
    procedure: Procedure[Any],
    graph: Graph,
    saves: Mapping[int, object],
    requests: Sequence[Any],
    module: nn.Module,
) -> tuple[Prepared, Sequence[Pass]]:
    """Plans a run and returns its passes too."""
    check_arguments(graph)
    plan = make_plan(graph, saves)
    watched = _watched(model, graph, plan)
    if graph.differentiates:
        check_gradients(graph, plan)
    moments = partial(_moments, model, procedure, requests)
    work = Work(graph, plan, asked_by(graph, plan, len(requests)), moments)
    demands = procedure.demands(module, requests, work)
    if len(requests) == 1:
        plans = [alone(0, demands.each[0], [*plan.reads])]
    else:
        from insitu.batching.planner import plan_passes  # takes a while, and one needs none

        plans = plan_passes(work, demands)
        _log(plans, len(requests))
    passes = procedure.passes(module, plans, requests)
    if plan.crosses or plan.skips:
        check_order(work, plans)
    returned = _NOTHING_RETURNED
    if plan.skips or plan.stops:
        returned = _returned(model, procedure, graph, requests)
        check_cuts(work)
    compiled = is_compiled(model.snapshot.parts)
    by_itself = len(requests) == 1 and not returned
    tree = model.snapshot
    found = (compiled, tree, model.exclusive, CallPath(watched), by_itself, ambient())
    return Prepared(plan, plans, returned, *found), passes


def _log(plans: Sequence[PassPlan], count: int) -> None:
    """Says which invocations have a pass for themselves that could share one otherwise."""
    reasons = Counter(single.apart.why for single in plans if single.apart is not None)
    for why, own in reasons.items():
        logger.info("%d of %d prompts run one by one: %s", own, count, why)


def explained(
    model: Subject,
    procedure: Procedure[Any],
    requests: Sequence[Any],
    plans: Sequence[PassPlan],
) -> list[Summary]:
    """Returns what the passes of a run do, for the user.

    Args:
        model: the model.
        procedure: how it runs.
        requests: what each invocation was given.
        plans: the passes.
    """
    return summaries(plans, procedure.facts, partial(_moments, model, procedure, requests))


def _moments(
    model: Subject, procedure: Procedure[Any], requests: Sequence[Any], invocation: int
) -> Mapping[Place, int] | None:
    """When the sites of an invocation come, or None if that is not known without a run."""
    try:
        return model.probe(procedure.example(requests[invocation]), procedure.views).moments
    except ShapeError:
        return None


def _returned(
    model: Subject, procedure: Procedure[Any], graph: Graph, requests: Sequence[Any]
) -> Mapping[int, Any]:
    """What the modules that are skipped would return, as fake tensors."""
    returned: dict[int, Any] = {}
    for read in graph.skips:
        node = graph[read]
        invocation, path, *_ = node.args
        try:
            probe = model.probe(procedure.example(requests[invocation]), procedure.views)
        except ShapeError as error:
            raise ShapeError(
                f"`{readable(path)}` cannot be skipped, because it is not known what it "
                f"returns. {error}",
                node.location,
            ) from error
        if path not in probe.returned:
            raise never_ran(graph, model.modules, Site(*node.args), probe.seen)
        returned[read] = probe.returned[path]
    return returned
