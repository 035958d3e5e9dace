"""What a job would take, and whether it may: all that is known before a job is accepted."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from msgspec import structs

from insitu.engine.unread_jobs import without_source
from insitu.graph.errors import InsituError
from insitu.remote.problems import ProblemError, problem_of
from insitu.remote.protocol import Usage
from insitu.server.engines.hosting import Host
from insitu.server.engines.messages import Admitted, Check, Refused
from insitu.server.job_limits import MOST_STRIKES, JobLimits, banned
from insitu.server.limits import Recent, TenantLimits, check_limits
from insitu.server.metrics import Metrics
from insitu.server.records import Price, Tenant
from insitu.server.settings import Settings
from insitu.server.storage.files import Files, digest_in_turn
from insitu.server.storage.store import Store

_UNKNOWN_RESULT_BYTES = 2**20


class Pricing:
    """Says what jobs take, and refuses those that cannot be run.

    Args:
        settings: what the server was told.
        store: what it remembers.
        files: where bytes are.
        metrics: counts refused jobs.
    """

    def __init__(self, settings: Settings, store: Store, files: Files, metrics: Metrics) -> None:
        self._settings, self._store = settings, store
        self._files, self._metrics = files, metrics
        self._recent: dict[str, Recent] = {}
        self._under_way: Counter[str] = Counter()  # jobs that are looked at, by their digests

    async def kept_part(self, body: bytes) -> bytes:
        """Returns the bytes that are kept of a job: with or without the texts of lines.

        Args:
            body: the bytes.

        Raises:
            ProblemError: if they are no job.
        """
        if self._settings.keeps_source:
            return body
        try:
            return await asyncio.to_thread(without_source, body)
        except InsituError as error:
            raise ProblemError(problem_of(error)) from None

    @asynccontextmanager
    async def priced(
        self, tenant: Tenant, host: Host, body: bytes
    ) -> AsyncGenerator[tuple[Price, Admitted, str]]:
        """Gives what a job takes, what it would give, and the digest of its bytes.

        They are in a file until the block ends, and after that if there is a job with them.

        Args:
            tenant: whose job it is.
            host: the model that it is for.
            body: its bytes.

        Raises:
            ProblemError: if it cannot be run.
        """
        self._check_received(tenant, len(body))
        self._files.check_space(len(body), self._store.reserved())
        digest = await digest_in_turn(body)
        self._under_way[digest] += 1
        try:
            await self._files.put_body_in_turn(body, digest)
            yield (*await self._price(tenant, host, digest), digest)
        finally:
            self._under_way[digest] -= 1
            if not self._under_way[digest]:
                del self._under_way[digest]
                if not self._store.refers(digest):
                    self._files.remove(self._files.body_path(digest))

    def _check_received(self, tenant: Tenant, size: int) -> None:
        """Raises if a tenant has sent too much lately. It counts from then on, also if refused."""
        recent, now = self._recent.setdefault(tenant.id, Recent()), self._store.now()
        check_limits(self.limits(tenant), {}, None, now, recent, received=float(size))
        recent.add(now, received=float(size))

    async def _price(self, tenant: Tenant, host: Host, digest: str) -> tuple[Price, Admitted]:
        """What a job takes, and what it would give."""
        if tenant.strikes >= MOST_STRIKES:
            raise ProblemError(banned(tenant.name, tenant.strikes))
        if host.state == "failed" and host.problem is not None:
            raise ProblemError(host.problem)
        blobs: dict[str, str] = {}
        answer = await self._checked(host, tenant, digest, blobs)
        if isinstance(answer, Refused) and answer.problem.code == "missing_blobs":
            wanted = answer.problem.digests
            sent = [one for one in wanted if self.has_blob(tenant, one)]
            if len(sent) == len(wanted):
                blobs = {one: str(self._files.blob_path(one)) for one in sent}
                answer = await self._checked(host, tenant, digest, blobs)
            else:
                lacking = tuple(one for one in wanted if one not in sent)
                answer = Refused(structs.replace(answer.problem, digests=lacking))
        if isinstance(answer, Refused):
            self._metrics.refused(answer.problem.code)
            raise ProblemError(answer.problem)
        return _price(answer, blobs, host.limits), answer

    def has_blob(self, tenant: Tenant, digest: str) -> bool:
        """Returns whether a tenant has sent a tensor.

        Args:
            tenant: whose.
            digest: its digest.
        """
        return self._store.has_blob(tenant.id, digest) and self._files.blob_path(digest).exists()

    def check_limits(
        self, tenant: Tenant, host: Host, price: Price, answer: Admitted, received: int
    ) -> None:
        """Raises if a tenant may not have a job run now. What it takes counts from then on.

        Args:
            tenant: whose job it is.
            host: the model that it is for.
            price: what it takes.
            answer: what admission found about it.
            received: how many bytes it has.

        Raises:
            ProblemError: in that case, saying when it may.
        """
        self._files.check_space(price.result_bytes + received, self._store.reserved())
        recent, now = self._recent.setdefault(tenant.id, Recent()), self._store.now()
        lengths, limits = host.lengths.new(answer.lengths), self.limits(tenant)
        kept = replace(price, result_bytes=price.result_bytes + received)
        new, turn = float(len(lengths)), host.seconds_to_wait()
        usage = self._store.usage(tenant.id)
        check_limits(limits, usage, kept, now, recent, lengths=new, turn=turn)
        recent.add(now, price.operations, lengths=new)
        host.lengths.know(lengths)

    def check_blob(self, tenant: Tenant, size: int, counts: bool = True) -> None:
        """Raises if a tenant may not send a tensor now.

        Args:
            tenant: who sends it.
            size: how many bytes it has.
            counts: whether it counts from then on.

        Raises:
            ProblemError: in that case, saying when it may.
        """
        self._files.check_space(size, self._store.reserved())
        recent, now = self._recent.setdefault(tenant.id, Recent()), self._store.now()
        usage = self._store.usage(tenant.id)
        check_limits(self.limits(tenant), usage, None, now, recent, received=float(size))
        if not counts:
            return
        recent.add(now, received=float(size))
        self._store.used(tenant.id, received=float(size))

    def usage(self, tenant: Tenant) -> Usage:
        """Returns what a tenant has used today.

        Args:
            tenant: whose.
        """
        used = self._store.usage(tenant.id)
        return Usage(
            used.get("operations", 0.0),
            used.get("seconds", 0.0),
            int(used.get("received", 0)),
            int(used.get("sent", 0)),
            int(used.get("queued", 0)),
            int(used.get("stored", 0)),
            self.limits(tenant).as_dict(),
        )

    def limits(self, tenant: Tenant) -> TenantLimits:
        """Returns what a tenant may take.

        Args:
            tenant: the tenant.
        """
        return TenantLimits.of(self._settings.tenant_limits, tenant.limits)

    async def _checked(
        self, host: Host, tenant: Tenant, digest: str, blobs: Mapping[str, str]
    ) -> Admitted | Refused:
        return await host.admission.check(
            Check(
                str(self._files.body_path(digest)),
                blobs,
                host.limits.as_dict(),
                tenant.id,
                self._settings.weights_readable,
                host.limits.each,
                host.limits.weight,
            )
        )


def _price(answer: Admitted, blobs: Mapping[str, str], limits: JobLimits) -> Price:
    unknown = max(_UNKNOWN_RESULT_BYTES, answer.peak_bytes)
    return Price(
        answer.passes,
        answer.operations + limits.beside(answer),
        answer.peak_bytes,
        int(unknown) if answer.result_bytes is None else answer.result_bytes,
        answer.invocations,
        answer.positions,
        answer.joins,
        answer.is_bounded,
        tuple(blobs),
    )
