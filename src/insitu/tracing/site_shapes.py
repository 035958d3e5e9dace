"""What will arrive at the sites of a run, as fake tensors: asked of a fake run of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from insitu.batching.procedure import Procedure, Subject
from insitu.engine.functions import Called
from insitu.engine.probe import Probe
from insitu.graph.errors import UnknownShapeError
from insitu.graph.node import EVERY, SEPARATOR, Graph, Site
from insitu.tracing.never_ran import never_ran


@dataclass(slots=True, eq=False)
class SiteShapes:
    """The shapes at the sites of a run whose lines were recorded in another process.

    Attributes:
        model: the model that will run.
        procedure: how it will run.
        requests: what each invocation is given.
        graph: what was recorded.
    """

    model: Subject
    procedure: Procedure[Any]
    requests: Sequence[Any]
    graph: Graph

    def arriving(self, site: Site) -> Any:
        """Returns what arrives at a site, with fake tensors in place of tensors."""
        request = self.requests[site.invocation]
        probe = self.model.probe(self.procedure.example(request), self.procedure.views)
        called = partial(called_in, self.model, self.procedure, request)
        return arriving_at(site, probe, called, self.graph, self.model)

    def writer(self) -> int | None:
        """Returns None: no line is being recorded."""
        return None


def called_in(
    model: Subject, procedure: Procedure[Any], request: Any, path: str
) -> Sequence[Called]:
    """Returns the torch functions that a module's forward calls, with fake tensors.

    Args:
        model: the model.
        procedure: how it runs.
        request: what an invocation is given.
        path: the module's path.

    Raises:
        ShapeError: if the model cannot be run on fake tensors.
    """
    return model.probe(procedure.example(request), procedure.views, path).called


def arriving_at(
    site: Site,
    probe: Probe,
    called: Callable[[str], Sequence[Called]],
    graph: Graph,
    model: Subject,
) -> Any:
    """Returns what arrives at a site, as fake tensors.

    Args:
        site: the site.
        probe: a fake run of what its invocation is given.
        called: gives the torch functions that the forward of a module calls.
        graph: what was recorded.
        model: the model.

    Raises:
        UnknownShapeError: if it is of a later step, or a token that a step chooses.
        NeverRanError: if nothing arrives there.
    """
    # A fake run is one forward: it knows nothing of later steps, nor which token is chosen.
    if site.step not in (0, EVERY) or site.kind in ("tokens", "choice"):
        raise UnknownShapeError(f"The shape of `{site}` is not known before the run.")
    path, inside, function = site.path.partition(SEPARATOR)
    if not inside:
        if site[1:4] not in probe.seen:
            raise never_ran(graph, model.modules, site, probe.seen)
        return probe.seen[site[1:4]]
    calls = [one for one in called(path) if one.name == function]
    if site.call >= len(calls):
        raise never_ran(graph, model.modules, site, probe.seen)
    args, kwargs = calls[site.call].inputs
    if site.kind == "output":
        return calls[site.call].output
    if site.kind == "inputs":
        return args, dict(kwargs)
    return args[0] if args else next(iter(kwargs.values()))
