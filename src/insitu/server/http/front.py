"""The HTTP front: it translates between HTTP and what a `Served` is asked. It has no state."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from insitu.server.http.bodies import Bodies
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.front_parts import FrontParts
from insitu.server.http.guard import Guard
from insitu.server.http.routes_jobs import job_routes
from insitu.server.http.routes_server import server_routes
from insitu.server.http.served import Served
from insitu.server.http.tenant_counts import TenantCount
from insitu.server.metrics import FrontMetrics


def app_of(server: Served, limits: FrontLimits | None = None) -> Starlette:
    """Returns a server as an application of ASGI.

    Args:
        server: what answers.
        limits: what a client may take; the defaults of `FrontLimits` unless given.
    """
    limits = limits or FrontLimits()
    metrics = FrontMetrics()
    bodies = Bodies(limits, server.settings.data)
    parts = FrontParts(
        server,
        limits,
        bodies,
        streams=TenantCount("streams", limits.streams_of_tenant, limits.streams),
        downloads=TenantCount("downloads", limits.downloads),
        waits=TenantCount("waits", limits.waits),
        metrics=metrics,
    )
    guard = Middleware(Guard, settings=server.settings, limits=limits, metrics=metrics)
    app = Starlette(
        routes=[*job_routes(parts), *server_routes(parts)],
        middleware=[guard],
        exception_handlers={HTTPException: _raise},
    )
    app.router.redirect_slashes = False  # a path is what it is: a redirect would lose the key
    return app


async def _raise(request: Any, error: Exception) -> Any:
    """Leaves it to the guard to report faults, so that all have one form."""
    raise error
