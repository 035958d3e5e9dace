"""The routes of jobs: to send one, to ask for it, to follow it, to have its results, to end it."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from insitu.remote.problems import ProblemError
from insitu.server.http.connections import connection_of
from insitu.server.http.event_streams import EventStream
from insitu.server.http.front_parts import FrontParts, json_answer
from insitu.server.http.query_values import asked_of, event_number, page_of, query_of
from insitu.server.http.refusals import INTERNAL, ClientGoneError, refused
from insitu.server.http.request_headers import only, wait_of
from insitu.server.http.result_files import results_answer
from insitu.server.records import JobRecord, Tenant
from insitu.server.states import has_ended

_ID = re.compile(r"[0-9a-f]{32}")


def job_routes(parts: FrontParts) -> list[Route]:
    """Returns the routes of jobs.

    Args:
        parts: what routes stand on.
    """
    routes = JobRoutes(parts)
    return [
        Route("/v1/jobs", routes.jobs, methods=["GET", "POST"]),
        Route("/v1/plan", routes.plan, methods=["POST"]),
        Route("/v1/jobs/{id}", routes.job, methods=["GET", "DELETE"]),
        Route("/v1/jobs/{id}/events", routes.job_events, methods=["GET"]),
        Route("/v1/jobs/{id}/result", routes.job_result, methods=["GET"]),
    ]


class JobRoutes:
    """The answers under each path.

    Args:
        parts: what routes stand on.
    """

    def __init__(self, parts: FrontParts) -> None:
        self._parts, self._server = parts, parts.server

    async def jobs(self, request: Request) -> Response:
        """Accepts a job, or lists those of the tenant."""
        tenant = self._parts.tenant_of(request)
        if request.method != "POST":
            states, after, limit = page_of(request)
            return json_answer(self._server.jobs(tenant, states, after, limit))
        asked = asked_of(request)
        async with self._parts.job_body(request, tenant) as body:
            record = await self._server.submit(tenant, body, asked)
        headers = dict[str, str]()
        wait = wait_of(request, self._parts.limits.longest_wait)
        if wait is not None and self._parts.waits.has_room(tenant.id):
            headers["Preference-Applied"] = f"wait={wait:g}"
            with self._parts.waits.one_of(tenant.id):
                record = await self._awaited(request, record, wait)
            if has_ended(record.state):
                return await self._end_of(request, tenant, record, headers)
        headers["Location"] = f"/v1/jobs/{record.id}"
        return json_answer(self._server.status(record), 202, headers)

    async def plan(self, request: Request) -> Response:
        """Says what a job would take."""
        tenant = self._parts.tenant_of(request)
        asked = asked_of(request)
        async with self._parts.job_body(request, tenant) as body:
            return json_answer(await self._server.plan(tenant, body, asked))

    async def job(self, request: Request) -> Response:
        """Says how a job is, or cancels it."""
        tenant = self._parts.tenant_of(request)
        query_of(request, ())
        record = self._job_of(request, tenant)
        if request.method == "DELETE":
            record = await self._server.cancel(tenant, record.id)
        return json_answer(self._server.status(record))

    async def job_events(self, request: Request) -> Any:
        """Follows a job."""
        tenant = self._parts.tenant_of(request)
        query_of(request, ())
        record = self._job_of(request, tenant)
        after = event_number(only(request, "last-event-id"))
        self._parts.streams.check(tenant.id)
        events = self._server.events(record.id, after)
        return EventStream(events, tenant.id, self._parts.streams, self._parts.limits)

    async def job_result(self, request: Request) -> Response:
        """Sends the results of a job, or a part of them."""
        tenant = self._parts.tenant_of(request)
        query_of(request, ())
        record = self._job_of(request, tenant)
        if record.state != "done":
            raise _no_result(record)
        return await self._results_of(request, tenant, record, {}, parts=True)

    async def _end_of(
        self, request: Request, tenant: Tenant, record: JobRecord, headers: dict[str, str]
    ) -> Response:
        """The answer to somebody who has waited for a job to end."""
        headers = {**headers, "Insitu-Job": record.id}
        if record.state != "done":
            return json_answer(self._server.status(record), 200, headers)
        place = f"/v1/jobs/{record.id}"
        if not self._parts.downloads.has_room(tenant.id):  # it was accepted: nothing is wrong
            return json_answer(self._server.status(record), 202, {**headers, "Location": place})
        headers["Content-Location"] = f"{place}/result"
        return await self._results_of(request, tenant, record, headers, parts=False)

    async def _results_of(
        self,
        request: Request,
        tenant: Tenant,
        record: JobRecord,
        headers: dict[str, str],
        parts: bool,
    ) -> Response:
        path, count = self._server.result_path(record), self._parts.downloads
        count.check(tenant.id)
        one = count.one_of(tenant.id)
        return await results_answer(request, path, record.result, headers, one, parts=parts)

    def _job_of(self, request: Request, tenant: Tenant) -> JobRecord:
        id = request.path_params["id"]
        if not _ID.fullmatch(id):
            raise refused(404, "not_found", "There is no such job.")
        return self._server.job(tenant, id)

    async def _awaited(self, request: Request, record: JobRecord, seconds: float) -> JobRecord:
        """Waits for a job to end, as long as somebody waits for the answer and the server runs."""
        connection = connection_of(request.scope)
        waiting = asyncio.ensure_future(self._server.ended(record.id, seconds))
        leaving = asyncio.ensure_future(_left(request))
        others = [leaving]
        if connection is not None:
            others.append(asyncio.ensure_future(connection.stopped.wait()))
        try:
            await asyncio.wait({waiting, *others}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return waiting.result()
            if leaving.done():
                raise ClientGoneError
            return record
        finally:
            for task in (waiting, *others):
                task.cancel()
            await asyncio.gather(waiting, *others, return_exceptions=True)


async def _left(request: Request) -> bool:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return True


def _no_result(record: JobRecord) -> ProblemError:
    """Why there are no results of a job."""
    if record.problem is not None:
        return ProblemError(record.problem)
    if record.state == "failed":
        return ProblemError(msgspec.structs.replace(INTERNAL, code="failed"))
    if record.state == "expired":
        return refused(410, "gone", "The results of this job are not kept any more.")
    if record.state == "cancelled":
        return refused(409, "cancelled", "This job was cancelled.")
    return refused(
        409,
        "not_done",
        f"This job is {record.state}. Follow its events, or ask again later.",
        retry_after=1.0,
    )
