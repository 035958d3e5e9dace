"""The other routes: tensors, models, usage, and how the server is."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from insitu.remote.protocol import SKELETON_TYPE
from insitu.server.http.bodies import declared_length
from insitu.server.http.front_parts import FrontParts, json_answer
from insitu.server.http.query_values import query_of
from insitu.server.http.ranges import is_known
from insitu.server.http.refusals import refused

_DIGEST = re.compile(r"[0-9a-f]{64}")
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def server_routes(parts: FrontParts) -> list[Route]:
    """Returns the routes that are not about a job.

    Args:
        parts: what routes stand on.
    """
    routes = ServerRoutes(parts)
    return [
        Route("/v1/blobs/{digest}", routes.blob, methods=["HEAD", "PUT"]),
        Route("/v1/models", routes.models, methods=["GET"]),
        Route("/v1/models/{id:path}/skeleton", routes.skeleton, methods=["GET"]),
        Route("/v1/usage", routes.usage, methods=["GET"]),
        Route("/healthz", routes.health, methods=["GET"]),
        Route("/readyz", routes.readiness, methods=["GET"]),
        Route("/metrics", routes.metrics, methods=["GET"]),
    ]


class ServerRoutes:
    """The answers under each path.

    Args:
        parts: what routes stand on.
    """

    def __init__(self, parts: FrontParts) -> None:
        self._parts, self._server = parts, parts.server

    async def blob(self, request: Request) -> Response:
        """Keeps a tensor, or says whether it is there: this tenant's, and nobody else's."""
        tenant = self._parts.tenant_of(request)
        query_of(request, ())
        digest = request.path_params["digest"]
        if not _DIGEST.fullmatch(digest):
            raise refused(404, "not_found", "This is no digest: it has 64 hexadecimal digits.")
        if request.method == "PUT":
            self._server.check_blob(tenant, declared_length(request) or 0)
            async with self._parts.blob_body(request, tenant) as body:
                await self._server.put_blob(tenant, digest, body)
        elif not self._server.has_blob(tenant, digest):
            raise refused(404, "not_found", "There is no such tensor.")
        return Response(None, 204)

    async def models(self, request: Request) -> Response:
        """Lists the models."""
        self._parts.tenant_of(request)
        query_of(request, ())
        return json_answer(self._server.models())

    async def skeleton(self, request: Request) -> Response:
        """Sends what a client makes a model without weights from."""
        self._parts.tenant_of(request)
        query_of(request, ())
        content, digest = self._server.skeleton(request.path_params["id"])
        headers = {"ETag": f'"{digest}"', "Cache-Control": "private, no-cache"}
        if is_known(request.headers.get("if-none-match"), headers["ETag"]):
            return Response(None, 304, headers)
        return Response(content, 200, headers, SKELETON_TYPE)

    async def usage(self, request: Request) -> Response:
        """Says what the tenant has used."""
        tenant = self._parts.tenant_of(request)
        query_of(request, ())
        return json_answer(self._server.usage(tenant))

    async def health(self, request: Request) -> Response:
        """Says that the front runs."""
        return json_answer({"status": "ok"})

    async def readiness(self, request: Request) -> Response:
        """Says whether every model runs jobs. How each is takes a key: `/v1/models` says it."""
        ready = all(state == "ready" for state in self._server.ready().values())
        return json_answer({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """Says what was measured, to who has a key for that."""
        self._parts.tenant_of(request, "admin")
        query_of(request, ())
        self._parts.metrics.streams.set(len(self._parts.streams))
        text = self._server.metrics() + self._parts.metrics.text()
        return Response(text, 200, media_type=_METRICS_TYPE)
