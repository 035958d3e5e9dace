"""What a tenant may have at once, through a whole server: jobs that run, bytes that are kept."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import safetensors.torch
import torch

from insitu.graph.wire_tensors import digest_of
from insitu.remote.problems import ProblemError
from insitu.server.records import Asked
from tests.server.samples import Sample
from tests.server.shared_server import shared
from tests.server.whole_server import ended, is_ready, stopped

pytestmark = pytest.mark.no_wire


@pytest.mark.slow
def test_no_more_jobs_of_a_tenant_run_at_once_than_may(
    tmp_path: Path, model: Path, job: Sample
) -> None:
    async def run() -> None:
        limits = {"running_jobs": 2.0}
        async with shared(tmp_path, model, {"a": 1.0, "b": 1.0}, tenant_limits=limits) as found:
            async with stopped(await is_ready(found.server)):
                jobs = [*await found.send("a", job, 9), *await found.send("b", job, 1)]
            states = {one.state for one in await ended(found.server, *jobs)}
            assert states == {"done"}
            counts = [batch.count("a") for batch in found.batches]
            assert max(counts) == 2 and sum(counts) == 9

    asyncio.run(run())


@pytest.mark.thorough
def test_tensors_that_are_kept_count_and_what_is_refused_leaves_nothing(
    tmp_path: Path, model: Path, job: Sample
) -> None:
    tensors = [torch.full((1000,), float(number)) for number in range(3)]
    blobs = {digest_of(one): safetensors.torch.save({"tensor": one}) for one in tensors}
    (first, one), (second, two), (third, three) = blobs.items()

    async def run() -> None:
        limits = {"stored_bytes": 10_000.0}
        async with shared(tmp_path, model, {"a": 1.0, "b": 1.0}, tenant_limits=limits) as found:
            server, a, b = found.server, found.tenant("a"), found.tenant("b")
            await server.put_blob(a, first, one)
            await server.put_blob(a, second, two)
            assert server.usage(a).stored == len(one) + len(two)
            with pytest.raises(ProblemError) as refused:  # before it comes, and once it has
                server.check_blob(a, len(three))
            assert refused.value.problem.limit == "stored_bytes"
            with pytest.raises(ProblemError):
                await server.put_blob(a, third, three)
            assert not server.files.blob_path(third).exists() and not server.has_blob(a, third)
            await server.put_blob(b, third, three)  # another has room
            for body in (b"no job", job.body[:-1] + b"?", job.body):
                with pytest.raises(ProblemError):
                    await server.submit(a, body, Asked())
            assert [*server.files.bodies.iterdir()] == []

    asyncio.run(run())
