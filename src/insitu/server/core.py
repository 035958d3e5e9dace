"""The server without HTTP: the questions that it is asked, and its answers.

A job is looked at by an admission worker, kept, and then it waits for an engine (`hosting.py`).
Nobody is told that a job was accepted before it is in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from insitu.about import installed_version
from insitu.graph.errors import nearest
from insitu.remote.key_files import forget_key, write_key
from insitu.remote.problems import Problem, ProblemError
from insitu.remote.protocol import (
    JobEvent,
    JobList,
    JobPlan,
    JobState,
    JobStatus,
    ModelList,
    Usage,
)
from insitu.server.accepting import Accepting
from insitu.server.attended import LOOK_SECONDS, Attended
from insitu.server.background import kept_up, note
from insitu.server.engines.hosting import Host
from insitu.server.engines.measuring import measure
from insitu.server.engines.scheduler import Scheduler
from insitu.server.forgetting import forget_now_and_then
from insitu.server.metrics import Metrics
from insitu.server.news import News
from insitu.server.pricing import Pricing
from insitu.server.records import Asked, JobRecord, Tenant
from insitu.server.settings import Settings
from insitu.server.states import has_ended, status_of
from insitu.server.storage.data_folder import locked, make_private
from insitu.server.storage.files import Files
from insitu.server.storage.keys import authenticate, own_key
from insitu.server.storage.keys_file import WatchedKeys
from insitu.server.storage.left_behind import take_over
from insitu.server.storage.sqlite_store import SqliteStore


class Server:
    """Models that many users share. What was leased when it last ended is queued again.

    Args:
        settings: what it was told.

    Attributes:
        settings: as given.
        store: what it remembers.
        files: where bytes are.
        hosts: its models, by id.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        make_private(settings.data)
        self._lock = locked(settings.data)
        self.files = Files(settings.data, settings.durable)
        self.store = SqliteStore(settings.data / "server.db", durable=settings.durable)
        self._metrics = Metrics()
        self._pricing = Pricing(settings, self.store, self.files, self._metrics)
        self._accepting = Accepting(settings, self.store, self.files, self._pricing, self._metrics)
        self._news = News()
        self._attended = Attended(self._news.is_followed)
        self._tasks: list[asyncio.Task[None]] = []
        self._own_key = ""
        self._keys: WatchedKeys | None = None
        if settings.keys is None:
            self._own_key = own_key(self.store, settings.data)
        else:
            self._keys = WatchedKeys(self.store, settings.keys)
        self._port: int | None = None
        take_over(self.store, {model.id for model in settings.models})
        self.hosts = {
            model.id: Host(
                model,
                settings,
                self.store,
                self.files,
                Scheduler(),
                self._metrics,
                self._news.tell,
            )
            for model in settings.models
        }

    async def start(self) -> None:
        """Starts the processes of all models, and waits until jobs can be admitted."""
        self.files.sweep(self.store.refers, grace=0)
        await asyncio.gather(*(host.start() for host in self.hosts.values()))
        old = (self.store, self.files, self._metrics, self.settings.stored_seconds, self._news.tell)
        self._tasks.append(kept_up("deleting what is old", partial(forget_now_and_then, *old)))
        self._tasks.append(kept_up("looking who is there", self._look_who_is_there))

    async def stop(self) -> None:
        """Ends all processes. Jobs that are queued or run will run when the server starts again."""
        for task in self._tasks:
            task.cancel()
        ends = [host.stop() for host in self.hosts.values()]
        for found in await asyncio.gather(*ends, *self._tasks, return_exceptions=True):
            if isinstance(found, Exception):
                note("ending a model", found)
        if self._port is not None:
            forget_key(self._port, self._own_key)
        self.store.close()
        self._lock.close()

    def announce(self, url: str) -> str:
        """Takes where the server is, so that the same user's clients find its key.

        Args:
            url: where it listens.

        Returns:
            The URL.
        """
        port = urlsplit(url).port
        if self._own_key and port is not None:
            write_key(port, self._own_key)
            self._port = port
        return url

    def tenant_of(self, key: str, scope: str = "jobs") -> Tenant:
        """Returns whose a key is.

        Args:
            key: the key.
            scope: what it has to be good for.

        Raises:
            ProblemError: if it is nobody's, or not good for that.
        """
        if self._keys is not None:
            self._keys.look()
        return authenticate(self.store, key, scope)

    # Jobs.

    async def submit(self, tenant: Tenant, body: bytes, asked: Asked) -> JobRecord:
        """Takes a job. It is in the store when this returns.

        Args:
            tenant: who sends it.
            body: its bytes.
            asked: what else there is to it.

        Raises:
            ProblemError: if it cannot be run, or not by this tenant now.
        """
        host = self._host(asked.model)
        kept = await self._accepting.accept(tenant, host, body, asked)
        if asked.attended and not has_ended(kept.state):
            self._attended.add(kept.id)
        return kept

    async def plan(self, tenant: Tenant, body: bytes, asked: Asked) -> JobPlan:
        """Returns what a job would take. Nothing is kept of it.

        Args:
            tenant: who asks.
            body: the bytes of the job.
            asked: what else there is to it.

        Raises:
            ProblemError: if it cannot be run.
        """
        host = self._host(asked.model)
        body = await self._pricing.kept_part(body)
        async with self._pricing.priced(tenant, host, body) as (price, admitted, _):
            return JobPlan(
                host.model.id,
                price.passes,
                admitted.operations,
                price.peak_bytes,
                admitted.result_bytes,
                admitted.results,
                admitted.differences,
                len(host.waiting),
                round(host.seconds_to_wait(), 3),
            )

    def job(self, tenant: Tenant, id: str) -> JobRecord:
        """Returns a job of a tenant.

        Args:
            tenant: whose.
            id: its id.

        Raises:
            ProblemError: if the tenant has no such job.
        """
        found = self.store.job(id)
        if found is None or found.tenant != tenant.id:
            raise _no_job(id)
        self._attended.seen(id)
        return found

    def jobs(self, tenant: Tenant, states: Collection[JobState], after: str, limit: int) -> JobList:
        """Returns a page of a tenant's jobs, the newest first.

        Args:
            tenant: whose.
            states: in which states; none for all.
            after: what the page before has said, "" for the first page.
            limit: how many at most.
        """
        before = int(after) if after.isdecimal() else None
        found = self.store.jobs(tenant.id, states, before, limit)
        more = str(found[-1].sequence) if len(found) == limit else None
        return JobList([self.status(job) for job in found], more)

    def status(self, record: JobRecord) -> JobStatus:
        """Returns what there is to say of a job.

        Args:
            record: the job.
        """
        return status_of(record, self.store.ahead(record) if record.state == "queued" else 0)

    async def cancel(self, tenant: Tenant, id: str) -> JobRecord:
        """Gives up a job. One that has ended stays as it is.

        Args:
            tenant: whose.
            id: the job.

        Raises:
            ProblemError: if the tenant has no such job.
        """
        record = self.job(tenant, id)
        return record if has_ended(record.state) else self._cancel(record)

    def _cancel(self, record: JobRecord) -> JobRecord:
        """Writes that a job is given up. What an engine says of it from then on counts nothing."""
        changes = {"expires": self.store.now() + self.settings.stored_seconds}
        moved = self.store.move(record.id, record.state, "cancelled", changes=changes)
        assert moved is not None  # it was looked up in the same turn
        self.hosts[record.model].give_up(record)
        self._metrics.ended(record.model, "cancelled")
        self._news.tell(record.id)
        return moved

    async def ended(self, id: str, seconds: float) -> JobRecord:
        """Waits until a job has ended, and returns it as it then is.

        Args:
            id: the job.
            seconds: how long to wait at most.

        Raises:
            ProblemError: if it was deleted meanwhile.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        with self._news.of(id) as event:
            while True:
                event.clear()
                record = self.store.job(id)
                if record is None:
                    raise _no_job(id)
                left = until - loop.time()
                if has_ended(record.state) or left <= 0:
                    return record
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), left)

    async def events(self, id: str, after: int) -> AsyncIterator[JobEvent]:
        """Gives the events of a job, those that come too, until it has ended.

        Args:
            id: the job.
            after: the number of the last event that is known.
        """
        with self._news.of(id) as event:
            while True:
                event.clear()
                record = self.store.job(id)
                found = self.store.events(id, after)
                for one in found:
                    yield one
                    after = one.number
                if not found:
                    if record is None or has_ended(record.state):
                        return
                    await event.wait()

    def result_path(self, record: JobRecord) -> Path:
        """Returns the file of a job's results.

        Args:
            record: a job that is done.
        """
        return self.files.result_path(record.result)

    # Blobs, models and the rest.

    def check_blob(self, tenant: Tenant, size: int) -> None:
        """Raises if a tenant may not send a tensor of a size now: before it is sent.

        Args:
            tenant: who sends it.
            size: its bytes.

        Raises:
            ProblemError: in that case, saying when it may.
        """
        self._pricing.check_blob(tenant, size, counts=False)

    async def put_blob(self, tenant: Tenant, digest: str, body: bytes | memoryview) -> None:
        """Keeps a tensor of a tenant.

        Args:
            tenant: whose.
            digest: its digest.
            body: the bytes of its file.

        Raises:
            ProblemError: if that is no tensor of this digest, or there is no room.
        """
        self._pricing.check_blob(tenant, len(body))
        await asyncio.to_thread(self.files.put_blob, digest, body)
        self.store.grant(tenant.id, digest, len(body))

    def has_blob(self, tenant: Tenant, digest: str) -> bool:
        """Returns whether a tenant has sent a tensor.

        Args:
            tenant: whose.
            digest: its digest.
        """
        return self._pricing.has_blob(tenant, digest)

    def models(self) -> ModelList:
        """Returns the models of the server."""
        return ModelList([host.status() for host in self.hosts.values()], installed_version())

    def skeleton(self, id: str) -> tuple[bytes, str]:
        """Returns the skeleton of a model, and its digest.

        Args:
            id: the model.

        Raises:
            ProblemError: if there is no such model.
        """
        return self._host(id).skeleton.travels()

    def usage(self, tenant: Tenant) -> Usage:
        """Returns what a tenant has used today.

        Args:
            tenant: whose.
        """
        return self._pricing.usage(tenant)

    def ready(self) -> Mapping[str, str]:
        """Returns the state of each model, by its id."""
        return {id: host.state for id, host in self.hosts.items()}

    def metrics(self) -> str:
        """Returns what was counted, as Prometheus reads it."""
        measure(self._metrics, self.store, self.hosts.values())
        return self._metrics.text()

    def _host(self, id: str) -> Host:
        if not id and len(self.hosts) == 1:
            return next(iter(self.hosts.values()))
        host = self.hosts.get(id)
        if host is None:
            near = nearest(id, self.hosts) or f": there are {', '.join(self.hosts)}"
            what = f"There is no model {id!r:.100} here{near}." if id else "Say which model."
            raise ProblemError(Problem("unknown_model", "Unknown model", 404, what))
        return host

    async def _look_who_is_there(self) -> None:
        """Gives up jobs whose clients have said that they wait, and have vanished."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for id in self._attended.left_alone():
                record = self.store.job(id)
                if record is not None and not has_ended(record.state):
                    self._cancel(record)


def _no_job(id: str) -> ProblemError:
    return ProblemError(Problem("not_found", "Not found", 404, f"There is no job {id!r:.50}."))
