"""Why nothing arrived at a site: the error for a module, a call or a step that never came.

It says what did run near it. That it is an error at all is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from insitu.engine.arrivals import Arrivals
from insitu.graph.errors import NeverRanError, nearest
from insitu.graph.node import SEPARATOR, Graph, Place, Site, readable
from insitu.tracing.run import Run


def never_ran(
    graph: Graph,
    modules: Mapping[str, nn.Module],
    site: Site,
    ran: Collection[Place] | None,
    went: Arrivals | None = None,
) -> NeverRanError:
    """Returns the error for a site at which nothing arrived.

    Args:
        graph: what was recorded.
        modules: the wrapped module's tree, by path.
        site: the site.
        ran: where something did arrive, if that is known.
        went: how the pass went, if that is known.
    """
    node = next(node for node in graph if node.site == site)
    path = readable(site.path) if site.path else "model"
    clock = None if went is None else went.clock
    had = site.step + 1 if clock is None else clock.steps(site.invocation)
    if site.step >= had:
        return NeverRanError(
            f"Step {site.step} never came, so `{site}` has no value: the generation ended "
            f"after {had} step{'s' * (had > 1)} (an end token, a stopping "
            "criterion, or `stop`). `save(optional=True)` lets a value be missing. In the place of "
            "a loop over `generator.steps`, `with generator.every_step():` saves a list of the "
            "steps that there were.",
            node.location,
        )
    calls = 0 if clock is None else clock.most.get(site.path, 0)
    # The run may have ended early. A fake run goes through all of a forward.
    if ran is not None:
        calls = max(calls, sum(place[:2] == site[1:3] for place in ran))
    if site.call and calls and SEPARATOR not in site.path:
        return NeverRanError(
            f"`{path}` was called {calls} time{'s' * (calls > 1)}, so there is no "
            f"`{path}.call({site.call})`: they count from 0.",
            node.location,
        )
    if SEPARATOR in site.path:
        owner, _, function = site.path.partition(SEPARATOR)
        return NeverRanError(
            f"The forward of `{readable(owner)}` called {function!r} {calls} times in this "
            f"run, so `{site}` has no value.",
            node.location,
        )
    message = f"`{path}` was not called in this run, so `{site}` has no value."
    if went is not None and went.stopped and graph.stops:
        message += " The run was ended before, by `stop`."
    elif isinstance(modules[site.path], nn.ModuleList | nn.ModuleDict):
        message += f" It only holds modules and is never called: take one, as in `{path}[0]`."
    elif ran is not None:
        message += _relatives(site.path, sorted({path for path, *_ in ran if path}))
    return NeverRanError(message, node.location)


def _relatives(path: str, ran: list[str]) -> str:
    """Which of the modules that ran are near a path, as the end of a message."""
    parent = path.rpartition(".")[0]
    near = [other for other in ran if other.startswith(f"{parent}.") or not parent]
    close = nearest(path, near or ran)
    if not close and near:
        close = f" (such as {', '.join(map(repr, near[:3]))})"
    return f" Near it, these were called{close}." if close else ""


def missing_value(run: Run, lacking: int, went: Arrivals | None) -> NeverRanError:
    """Returns the error for the node of a run that reads a site at which nothing arrived.

    Args:
        run: the run.
        lacking: the index of the node.
        went: how the pass went, if that is known.
    """
    graph = run.lines.graph
    site = graph[lacking].site
    assert site is not None
    try:
        ran = run.probe(site.invocation).seen
    except Exception:  # the probe only adds to the message
        ran = None
    return never_ran(graph, run.model.modules, site, ran, went)
