from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from insitu.remote.problems import Problem
from insitu.server.engines.held_jobs import HeldJobs
from insitu.server.engines.messages import Ended, Told
from insitu.server.engines.waiting_jobs import WaitingJobs
from insitu.server.metrics import Metrics
from insitu.server.records import JobRecord, Tenant
from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.files import Files, put_result
from insitu.server.storage.left_behind import take_over
from insitu.server.storage.sqlite_store import SqliteStore
from tests.server.stores import job_in, new_job

MODEL = "insitu/eiffel"


class FullStore(SqliteStore):
    """A store on a disk that is full whenever a test says so."""

    full = False

    def _look(self) -> None:
        if self.full:
            raise StorageError("full")

    def move(self, *given: Any, **named: Any) -> JobRecord | None:
        self._look()
        return super().move(*given, **named)

    def tell(self, *given: Any, **named: Any) -> Any:
        self._look()
        return super().tell(*given, **named)

    def used(self, *given: Any, **named: Any) -> None:
        self._look()
        super().used(*given, **named)

    def give_back(self, *given: Any, **named: Any) -> Any:
        self._look()
        return super().give_back(*given, **named)

    def strike(self, *given: Any, **named: Any) -> int:
        self._look()
        return super().strike(*given, **named)


@dataclass
class Model:
    """What there is to a model without its processes."""

    store: FullStore
    files: Files
    waiting: WaitingJobs = field(default_factory=lambda: WaitingJobs([]))
    changed: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.store.put_tenant(Tenant("ada", "Ada"))
        self.held = HeldJobs(
            self.store, self.files, self.waiting, Metrics(), MODEL, 100.0, self.changed.append
        )

    def queued(self, count: int = 1) -> list[JobRecord]:
        jobs = [self.store.add(new_job()) for _ in range(count)]
        for job in jobs:
            self.waiting.add(job)
        return jobs

    def begun(self, count: int = 1) -> tuple[int, list[JobRecord]]:
        number, leased = self.held.lease(self.queued(count), "e1", False)
        self.held.began(number)
        return number, leased

    def done(self, job: JobRecord) -> Ended:
        digest = put_result(self.files.results, job.id.encode())
        return Ended(job.id, job.attempt, digest, len(job.id))

    def state(self, job: JobRecord) -> tuple[str, int]:
        found = self.store.job(job.id)
        assert found is not None
        return found.state, found.attempt


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    store = FullStore(tmp_path / "store")
    yield Model(store, Files(tmp_path / "data"))
    store.close()


def test_a_job_is_leased_run_and_done(model: Model) -> None:
    number, (job,) = model.begun()
    assert len(model.waiting) == 0
    model.held.happened([Told(job.id, 1, "progress", {"done": 0.5})])
    model.held.happened([model.done(job)])
    model.held.batch_ended(number, 2.0, 1)
    states = [one.data.get("state") for one in model.store.events(job.id)]
    assert states == ["queued", "leased", "running", None, "done"]
    assert model.store.usage("ada")["seconds"] == 2.0
    assert not model.held.batches and model.changed == [job.id] * 4


def test_an_end_that_a_full_disk_has_no_room_for_is_written_later(model: Model) -> None:
    number, (job,) = model.begun()
    model.store.full = True
    model.held.happened([Told(job.id, 1, "progress", {"done": 0.5})])
    model.held.happened([model.done(job)])
    model.held.batch_ended(number, 1.0, 1)
    assert model.state(job) == ("running", 1) and not model.held.batches
    assert not model.held.unwritten.again()
    model.store.full = False
    assert model.held.unwritten.again() and model.state(job) == ("done", 1)
    assert model.store.usage("ada")["seconds"] == 1.0
    kinds = [one.kind for one in model.store.events(job.id)]
    assert kinds == ["state"] * 4  # the progress is left out


def test_a_beginning_that_was_not_written_is_written_before_the_end(model: Model) -> None:
    number, (job,) = model.held.lease(model.queued(), "e1", False)
    model.store.full = True
    model.held.began(number)
    model.held.happened([model.done(job)])
    model.store.full = False
    model.held.unwritten.again()
    states = [one.data["state"] for one in model.store.events(job.id)]
    assert states == ["queued", "leased", "running", "done"]


def test_jobs_that_a_full_disk_lets_nobody_lease_wait_on(model: Model) -> None:
    jobs = model.queued(3)
    model.store.full = True
    assert model.held.lease(jobs, "e1", False)[1] == []
    assert [*model.waiting.in_order()] == jobs and not model.held.batches
    model.store.full = False
    assert len(model.held.lease(jobs, "e1", False)[1]) == 3


def test_what_an_engine_had_comes_back_when_there_is_room(model: Model) -> None:
    _, jobs = model.begun(2)
    model.store.full = True
    model.held.take_back("e1")
    assert len(model.waiting) == 0
    model.store.full = False
    model.held.unwritten.again()
    assert [job.id for job in model.waiting.in_order()] == [job.id for job in jobs]
    assert [model.state(job) for job in jobs] == [("queued", 1)] * 2


def test_an_attempt_counts_only_if_it_had_begun(model: Model) -> None:
    _, (job,) = model.held.lease(model.queued(), "e1", False)
    model.held.take_back("e1")
    assert model.state(job) == ("queued", 0)


def test_an_attempt_does_not_count_if_the_server_was_told_to_end(model: Model) -> None:
    _, (job,) = model.begun()
    model.held.take_back("e1", counts=False)
    assert model.state(job) == ("queued", 0)
    assert [one.id for one in model.waiting.in_order()] == [job.id]


def test_a_job_that_ends_its_engine_three_times_fails_and_its_tenant_is_struck(
    model: Model,
) -> None:
    (job,) = model.queued()
    for attempt in (1, 2, 3):
        number, (leased,) = model.held.lease([*model.waiting.in_order()], f"e{attempt}", False)
        model.held.began(number)
        assert leased.attempt == attempt
        model.held.take_back(f"e{attempt}")
    found = model.store.job(job.id)
    assert found is not None and found.state == "failed"
    assert found.problem is not None and found.problem.code == "engine_died"
    tenant = model.store.tenant("ada")
    assert tenant is not None and tenant.strikes == 1 and len(model.waiting) == 0


def test_nobody_is_struck_for_what_ran_beside_others(model: Model) -> None:
    jobs = [job_in(model.store, "queued", attempt=2), *model.queued()]
    number, _ = model.held.lease(jobs, "e1", False)
    model.held.began(number)
    model.held.take_back("e1")
    assert [model.state(job)[0] for job in jobs] == ["failed", "queued"]
    tenant = model.store.tenant("ada")
    assert tenant is not None and tenant.strikes == 0


def test_neighbours_are_halved_and_then_alone(model: Model) -> None:
    _, jobs = model.begun(64)
    model.held.take_back("e1")
    found = model.store.job(jobs[0].id)
    assert found is not None and found.company == 7
    number, _ = model.held.lease([*model.waiting.in_order()][:8], "e2", False)
    model.held.began(number)
    model.held.take_back("e2")
    found = model.store.job(jobs[0].id)
    assert found is not None and found.company == 0


def test_an_end_of_an_earlier_attempt_counts_for_nothing(model: Model) -> None:
    _, (job,) = model.begun()
    model.held.happened([Ended(job.id, 0, cancelled=True)])
    assert model.state(job) == ("running", 1)
    model.held.take_back("e1")
    model.held.happened([model.done(job)])
    assert model.state(job) == ("queued", 1)


def test_a_job_that_was_cancelled_stays_so_whatever_its_engine_says(model: Model) -> None:
    number, (job,) = model.begun()
    model.store.move(job.id, "running", "cancelled")
    model.held.happened([model.done(job)])
    model.held.batch_ended(number, 1.0, 1)
    assert model.state(job) == ("cancelled", 1)


def test_a_job_whose_result_was_deleted_runs_again_and_not_for_ever(model: Model) -> None:
    (job,) = model.queued()
    for attempt in (1, 2, 3):
        number, (leased,) = model.held.lease([*model.waiting.in_order()], "e1", False)
        model.held.began(number)
        ended = model.done(leased)
        model.files.result_path(ended.digest).unlink()
        model.held.happened([ended])
        model.held.batch_ended(number, 1.0, 1)
        assert model.state(job) == ("queued" if attempt < 3 else "failed", attempt)


def test_an_engine_that_forgets_a_job_is_at_fault(model: Model) -> None:
    number, (job,) = model.begun()
    with pytest.raises(ValueError, match="no end"):
        model.held.batch_ended(number, 1.0, 1)
    model.held.take_back("e1")  # as when it is ended for that
    assert model.state(job) == ("queued", 1)


def test_jobs_that_wait_can_be_failed(model: Model) -> None:
    jobs = model.queued(2)
    model.store.full = True
    model.held.fail(jobs, Problem("model_changed", "Model changed", 409, "Another one."))
    assert len(model.waiting) == 0
    model.store.full = False
    model.held.unwritten.again()
    assert [model.state(job) for job in jobs] == [("failed", 0)] * 2


def test_what_a_server_leaves_behind_is_taken_over_by_the_next(model: Model) -> None:
    store = model.store
    leased, running = job_in(store, "leased"), job_in(store, "running")
    last = job_in(store, "running", engine="e2", attempt=2)
    waits, other = job_in(store, "queued"), job_in(store, "queued", model="gone")
    ended = job_in(store, "done")
    take_over(store, {MODEL})
    assert model.state(leased) == ("queued", 0)
    assert model.state(running) == ("queued", 1)
    assert model.state(last) == ("failed", 3)
    assert (model.state(waits), model.state(ended)) == (("queued", 0), ("done", 1))
    gone = store.job(other.id)
    assert gone is not None and gone.problem is not None
    assert (gone.state, gone.problem.code) == ("failed", "model_changed")


def test_a_job_that_hangs_its_engine_counts_once_also_if_it_was_cancelled(model: Model) -> None:
    _, (job,) = model.begun()
    model.store.move(job.id, "running", "cancelled")
    model.held.take_back("e1", hung=True)
    tenant = model.store.tenant("ada")
    assert tenant is not None and tenant.strikes == 1
    _, (again,) = model.begun()
    for attempt in (1, 2, 3):
        model.held.take_back(f"e{attempt}", hung=True)
        number, _ = model.held.lease([*model.waiting.in_order()], f"e{attempt + 1}", False)
        model.held.began(number)
    tenant = model.store.tenant("ada")
    assert tenant is not None and tenant.strikes == 2 and model.state(again)[0] == "failed"


def test_who_waits_between_its_pieces_is_not_struck_for_another(model: Model) -> None:
    model.store.put_tenant(Tenant("bo", "Bo"))
    number, _ = model.held.lease(model.queued(), "e1", True)
    model.held.began(number)
    inner = model.store.add(replace(new_job(), tenant="bo"))
    number, _ = model.held.lease([inner], "e1", False)
    model.held.began(number)
    model.held.take_back("e1", hung=True)
    struck = [model.store.tenant(name) for name in ("ada", "bo")]
    assert [one.strikes for one in struck if one is not None] == [0, 1]


def test_no_attempt_tells_of_a_token_or_a_value_that_another_has_told_of(model: Model) -> None:
    first = [{"block": 0, "invocation": 0, "step": step, "ids": [step]} for step in (0, 1, 2)]
    value = {"name": "logits", "bytes": 8, "step": None}
    _, (job,) = model.begun()
    model.held.happened([Told(job.id, 1, "token", one) for one in first[:2]])
    model.held.happened([Told(job.id, 1, "value", value)])
    model.held.take_back("e1")
    number, (job,) = model.held.lease([*model.waiting.in_order()], "e2", False)
    model.held.began(number)
    model.held.happened([Told(job.id, 2, "token", one) for one in first])
    model.held.happened([Told(job.id, 2, "value", one) for one in (value, {**value, "step": 1})])
    told = [one for one in model.store.events(job.id) if one.kind in ("token", "value")]
    assert [one.data["step"] for one in told] == [0, 1, None, 2, 1]


def test_what_an_engine_left_that_could_not_be_given_back_is_queued_later(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (job,) = model.begun()

    def broken(*given: Any) -> Any:
        raise RuntimeError("a fault of the store")

    with monkeypatch.context() as patch:
        patch.setattr(model.store, "give_back", broken)
        with pytest.raises(RuntimeError):
            model.held.take_back("e1")
    now = model.store.now()
    monkeypatch.setattr(model.store, "_clock", lambda: now + 1000.0)
    assert model.state(job) == ("running", 1)
    model.held.take_overdue("e2")
    assert model.state(job) == ("queued", 1) and len(model.waiting) == 1
