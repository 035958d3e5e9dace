"""What all routes stand on: the server, who asks, bodies, and answers in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from insitu.server.http.bodies import Bodies
from insitu.server.http.front_limits import FrontLimits
from insitu.server.http.request_headers import (
    check_blob_type,
    check_job_type,
    check_protocol,
    key_of,
)
from insitu.server.http.served import Served
from insitu.server.http.tenant_counts import TenantCount
from insitu.server.metrics import FrontMetrics
from insitu.server.records import Tenant


@dataclass(frozen=True, slots=True)
class FrontParts:
    """What all routes stand on.

    Attributes:
        server: what answers.
        limits: what a client may take.
        bodies: how bodies are read.
        streams: counts event streams.
        downloads: counts results that are being sent.
        waits: counts requests that wait for their jobs.
        metrics: where requests are counted.
    """

    server: Served
    limits: FrontLimits
    bodies: Bodies
    streams: TenantCount
    downloads: TenantCount
    waits: TenantCount
    metrics: FrontMetrics

    def tenant_of(self, request: Request, scope: str = "jobs") -> Tenant:
        """Returns who asks.

        Args:
            request: the request.
            scope: what its key has to be good for.

        Raises:
            ProblemError: 400 for another version of the protocol, 401 without a key that is good,
                403 without the scope.
        """
        check_protocol(request)
        return self.server.tenant_of(key_of(request), scope)

    def job_body(self, request: Request, tenant: Tenant) -> AbstractAsyncContextManager[bytes]:
        """Returns a block with the bytes of a job; see `Bodies.body_of`."""
        check_job_type(request)
        most = self.server.settings.longest_body
        return self.bodies.body_of(request, tenant.id, most, "longest_body")

    def blob_body(
        self, request: Request, tenant: Tenant
    ) -> AbstractAsyncContextManager[bytes | memoryview]:
        """Returns a block with the bytes of a tensor; see `Bodies.view_of`."""
        check_blob_type(request)
        most = self.server.settings.longest_blob
        return self.bodies.view_of(request, tenant.id, most, "longest_blob")


def json_answer(
    found: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns a record as an answer.

    Args:
        found: the record.
        status: the HTTP status.
        headers: further headers.
    """
    body = msgspec.json.encode(found)
    return Response(body, status, dict(headers or {}), "application/json")
