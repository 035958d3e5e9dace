"""Who gets how much of an engine, through a whole server: counted in batches and in jobs.

How a batch is chosen from jobs that wait is tested in `test_scheduler.py`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from insitu.remote.problems import ProblemError
from insitu.server.records import JobRecord
from tests.server.samples import Sample
from tests.server.shared_server import shared
from tests.server.whole_server import ended, is_ready, stopped

pytestmark = pytest.mark.no_wire


@pytest.mark.thorough
@pytest.mark.parametrize("joins", [True, False])
def test_who_comes_with_one_job_waits_for_two_batches_at_most(
    tmp_path: Path, model: Path, job: Sample, joins: bool
) -> None:
    async def run() -> None:
        weights = {"many": 1.0, "one": 1.0}
        async with shared(tmp_path, model, weights, joins=joins) as found:
            async with stopped(await is_ready(found.server)):
                jobs = await found.send("many", job, 100)
                before = len(found.batches)  # the one that runs
                jobs += await found.send("one", job)
            await ended(found.server, *jobs)
            assert before == 1
            assert "one" in [*found.batches[before], *found.batches[before + 1]]

    asyncio.run(run())


def order_of(
    folder: Path,
    model: Path,
    weights: Mapping[str, float],
    job: Sample,
    *sent: tuple[str, int, str],
) -> list[str]:
    """Whose jobs run one by one, in their order, of tenants who send all of theirs at once."""

    async def run() -> list[str]:
        async with shared(folder, model, weights, joins=False) as found:
            jobs: list[JobRecord] = []
            async with stopped(await is_ready(found.server)):
                for name, count, priority in sent:
                    jobs += await found.send(name, job, count, priority=priority)
            await ended(found.server, *jobs)
            return [name for batch in found.batches for name in batch]

    return asyncio.run(run())


@pytest.mark.slow
def test_tenants_get_as_much_as_their_weights_say_while_both_wait(
    tmp_path: Path, model: Path, job: Sample
) -> None:
    sent = ("a", 60, "interactive"), ("b", 60, "interactive")
    order = order_of(tmp_path, model, {"a": 3.0, "b": 1.0}, job, *sent)
    assert Counter(order) == {"a": 60, "b": 60}
    for count in range(1, 80):
        had = Counter(order[:count])
        assert abs(had["a"] - 3 * had["b"]) <= 4, (count, had)


@pytest.mark.thorough
def test_what_nobody_waits_for_gets_a_tenth_and_no_less(
    tmp_path: Path, model: Path, job: Sample
) -> None:
    sent = ("a", 60, "interactive"), ("b", 20, "batch")
    order = order_of(tmp_path, model, {"a": 1.0, "b": 1.0}, job, *sent)
    assert 4 <= Counter(order[:55])["b batch"] <= 7, order


@pytest.mark.slow
def test_a_tenant_who_may_not_queue_more_is_refused_and_no_other(
    tmp_path: Path, model: Path, job: Sample
) -> None:
    async def run() -> None:
        weights, limits = {"a": 1.0, "b": 1.0}, {"queued_jobs": 5.0}
        async with shared(tmp_path, model, weights, tenant_limits=limits) as found:
            async with stopped(await is_ready(found.server)):
                jobs: list[JobRecord] = []
                with pytest.raises(ProblemError) as refused:
                    for _ in range(100):
                        jobs += await found.send("a", job)
                assert refused.value.problem.status == 429
                assert (refused.value.problem.retry_after or 0) > 0
                assert len(jobs) <= 7  # of which one runs
                jobs += await found.send("b", job)
            assert {one.state for one in await ended(found.server, *jobs)} == {"done"}

    asyncio.run(run())
