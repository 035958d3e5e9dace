"""A whole server with several tenants, and what it has chosen to run of theirs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from insitu.server.core import Server
from insitu.server.records import Asked, JobRecord, Tenant
from insitu.server.storage.keys import make_key
from insitu.server.storage.keys_file import write_keys
from tests.server.samples import Sample
from tests.server.whole_server import MODEL, running


class Shared:
    """A server with several tenants, and the batches that it has chosen, by tenants."""

    def __init__(self, server: Server, keys: Mapping[str, str]) -> None:
        self.server, self._keys = server, keys
        self.batches: list[list[str]] = []
        scheduler = server.hosts[MODEL].scheduler
        pick = scheduler.pick

        def noted(*given: Any) -> Sequence[JobRecord]:
            picked = pick(*given)
            if picked:
                self.batches.append([self._name(one) for one in picked])
            return picked

        scheduler.pick = noted

    def tenant(self, name: str) -> Tenant:
        """A tenant."""
        return self.server.tenant_of(self._keys[name])

    async def send(self, name: str, job: Sample, count: int = 1, **asked: Any) -> list[JobRecord]:
        """Lets a tenant send a job some times."""
        tenant = self.tenant(name)
        return [await self.server.submit(tenant, job.body, Asked(**asked)) for _ in range(count)]

    def _name(self, job: JobRecord) -> str:
        return job.tenant if job.priority == "interactive" else f"{job.tenant} {job.priority}"


@asynccontextmanager
async def shared(
    folder: Path, model: Path, weights: Mapping[str, float], **settings: Any
) -> AsyncIterator[Shared]:
    """A server whose engine begins with nothing but one job while the block is entered."""
    tenants = [Tenant(name, name, weight) for name, weight in weights.items()]
    keys = {name: make_key(name) for name in weights}
    write_keys(folder / "keys.json", tenants, [kept for _, kept in keys.values()])
    given = {"keys": folder / "keys.json", **settings}
    async with running(folder / "data", model, **given) as server:
        yield Shared(server, {name: text for name, (text, _) in keys.items()})
