"""Whether a graph that was recorded elsewhere means something on a model, before it is run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from insitu.batching.procedure import Procedure
from insitu.graph.errors import JobError, PathError, nearest
from insitu.graph.location import Location
from insitu.graph.node import SEPARATOR, Graph, ModuleRef, Subgraph, readable


def check_graph(
    graph: Graph, modules: Collection[str], requests: Sequence[Any], procedure: Procedure[Any]
) -> None:
    """Checks that the sites and the modules of a graph are there.

    Args:
        graph: the graph.
        modules: the paths of the model's modules.
        requests: what its invocations are given.
        procedure: how it is to run.

    Raises:
        PathError: for a module that the model does not have.
        JobError: for an invocation or a step that there is not.
        OptionError: for tokens of steps that choose none.
    """
    check_modules(graph, modules)
    counts = [procedure.steps_of(request) for request in requests]
    for node in graph:
        site = node.site
        if site is None:
            continue
        if site.invocation >= len(requests):
            raise JobError(
                f"`{site}` is of invocation {site.invocation}, and there are {len(requests)}.",
                node.location,
            )
        if site.kind in ("tokens", "choice"):
            procedure.check_tokens(node.location)
        steps = counts[site.invocation]
        if steps is not None and site.step >= steps:
            raise JobError(
                f"`{site}` is of a step that does not come: there {_counted(steps)}.",
                node.location,
            )


def absent(path: str, modules: Collection[str], location: Location) -> PathError:
    """Returns the error for a module that the model does not have.

    Args:
        path: the module's path.
        modules: the paths of the model's modules.
        location: the user's line.
    """
    near = nearest(path, modules)
    return PathError(f"The model has no module {readable(path)!r} now{near}.", location)


def check_modules(graph: Graph, modules: Collection[str]) -> None:
    """Checks that the modules of a graph are there, also those that its functions call.

    Args:
        graph: the graph.
        modules: the paths of the model's modules.

    Raises:
        PathError: for a module that the model does not have.
    """
    for node in graph:
        named = [arg.path for arg in node.args if isinstance(arg, ModuleRef)]
        if node.site is not None:
            named.append(node.site.path.partition(SEPARATOR)[0])
        for path in named:
            if path not in modules:
                raise absent(path, modules, node.location)
        # Functions of `cond` and `fold` are graphs of their own.
        for arg in node.args:
            if isinstance(arg, Subgraph):
                check_modules(arg.graph, modules)


def _counted(steps: int | None) -> str:
    return "is one step" if steps == 1 else f"are {steps}"
