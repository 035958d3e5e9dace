"""Accepting a job: it is looked at, and then it is in the store, once."""

from __future__ import annotations

import contextlib
import secrets

from insitu.remote.problems import Problem, ProblemError
from insitu.server.engines.hosting import Host
from insitu.server.metrics import Metrics
from insitu.server.pricing import Pricing
from insitu.server.records import Asked, JobRecord, Price, Tenant
from insitu.server.settings import Settings
from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.files import Files, digest_in_turn
from insitu.server.storage.store import Store

_OTHER_BODY = Problem(
    "idempotency",
    "Another job",
    422,
    "Another job was sent with this `Idempotency-Key`: give each job a key of its own.",
)


class Accepting:
    """Takes jobs.

    Args:
        settings: what the server was told.
        store: what it remembers.
        files: where bytes are.
        pricing: says what jobs take.
        metrics: counts accepted jobs.
    """

    def __init__(
        self, settings: Settings, store: Store, files: Files, pricing: Pricing, metrics: Metrics
    ) -> None:
        self._settings, self._store, self._files = settings, store, files
        self._pricing, self._metrics = pricing, metrics

    async def accept(self, tenant: Tenant, host: Host, body: bytes, asked: Asked) -> JobRecord:
        """Takes a job. One that was sent before is returned as it is.

        Args:
            tenant: whose job it is.
            host: the model that it is for.
            body: its bytes.
            asked: what else there is to it.

        Raises:
            ProblemError: if it cannot be run, or not by this tenant now.
        """
        body = await self._pricing.kept_part(body)
        kept = self._store.sent(tenant.id, asked.idempotency) if asked.idempotency else None
        if kept is None:
            kept = await self._new(tenant, host, body, asked)
        elif kept.body != await digest_in_turn(body):
            raise ProblemError(_OTHER_BODY)
        return kept

    async def _new(self, tenant: Tenant, host: Host, body: bytes, asked: Asked) -> JobRecord:
        try:
            async with self._pricing.priced(tenant, host, body) as (price, answer, digest):
                self._pricing.check_limits(tenant, host, price, answer, len(body))
                return await self._added(tenant, host, body, asked, price, digest)
        except ProblemError:
            with contextlib.suppress(StorageError):
                self._store.used(tenant.id, received=len(body))
            raise

    async def _added(
        self, tenant: Tenant, host: Host, body: bytes, asked: Asked, price: Price, digest: str
    ) -> JobRecord:
        """A job that may be run, as it is kept."""
        record = JobRecord(
            secrets.token_hex(16),
            tenant.id,
            host.model.id,
            "queued",
            asked.priority,
            digest,
            price,
            body_bytes=len(body),
            seconds=asked.seconds,
            expires=self._store.now() + self._settings.stored_seconds,  # anew when it ends
            idempotency=asked.idempotency,
        )
        # In the same turn as `add`, so that nothing deletes the file between.
        while not self._files.body_path(digest).exists():
            await self._files.put_body_in_turn(body, digest)
        with self._store.together():
            kept = self._store.add(record)
            if kept.id == record.id:
                used = {"received": float(len(body)), "operations": price.operations}
                self._store.used(tenant.id, **used)
        if kept.id == record.id:
            host.take(kept)
            self._metrics.accepted(host.model.id, asked.priority)
        elif kept.body != digest:
            raise ProblemError(_OTHER_BODY)
        return kept
