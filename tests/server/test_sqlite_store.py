import contextlib
import itertools
import math
import os
import random
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from insitu import LoadError
from insitu.remote.problems import Problem, ProblemError
from insitu.remote.protocol import ENDS, JobState
from insitu.server.records import JobRecord, Key, Price, Tenant
from insitu.server.states import FOLLOWS, MOST_ATTEMPTS
from insitu.server.storage.sqlite_schema import VERSION
from insitu.server.storage.sqlite_store import SqliteStore
from tests.server.stores import Clocks, job_in, new_job

STATES: tuple[JobState, ...] = get_args(JobState)
DIED = Problem("engine_died", "Engine died", 500, "The engine has ended.")


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def store(tmp_path: Path, clocks: Clocks) -> Iterator[SqliteStore]:
    made = SqliteStore(tmp_path / "store", clock=clocks.made())
    yield made
    made.close()


def said(store: SqliteStore, id: str) -> list[tuple[int, Any]]:
    """The states that events tell of."""
    return [(one.number, one.data["state"]) for one in store.events(id) if one.kind == "state"]


# States.


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_a_job_moves_exactly_where_the_table_says(
    store: SqliteStore, before: JobState, after: JobState
) -> None:
    job = job_in(store, before)
    events = store.events(job.id)
    if (before, after) not in FOLLOWS:
        with pytest.raises(ValueError):
            store.move(job.id, before, after)
        assert store.job(job.id) == job and store.events(job.id) == events
        return
    now = store.move(job.id, before, after, data={"why": "test"})
    assert now is not None and now == store.job(job.id) and now.state == after
    (*earlier, last) = store.events(job.id)
    assert earlier == events and last.number == len(events) + 1
    assert last.data == {"why": "test", "state": after, "attempt": now.attempt}
    assert now.attempt == job.attempt + (after == "leased")
    assert (now.ended is not None) == (after in ENDS)
    assert now.started == (store.now() if after == "running" else job.started)
    if after not in ("leased", "running"):
        assert (now.engine, now.lease_until) == ("", None)


@pytest.mark.parametrize(("before", "after"), sorted(FOLLOWS))
def test_a_job_that_is_elsewhere_does_not_move(
    store: SqliteStore, before: JobState, after: JobState
) -> None:
    for state in STATES:
        job = job_in(store, state)
        if state != before:
            assert store.move(job.id, before, after) is None
        assert store.move(job.id, before, after, attempt=job.attempt + 1) is None
        assert store.job(job.id) == job and len(store.events(job.id)) == len(said(store, job.id))
    assert store.move("0" * 32, before, after) is None


def test_a_move_sets_other_fields_but_not_those_that_stay(store: SqliteStore) -> None:
    job = job_in(store, "running", company=7)
    done = {"result": "cd" * 32, "result_bytes": 12, "expires": store.now() + 9}
    moved = store.move(job.id, "running", "done", attempt=1, changes=done)
    assert moved == replace(
        job, state="done", ended=store.now(), engine="", lease_until=None, **done
    )
    job = job_in(store, "queued")
    for name in ("id", "tenant", "model", "body", "sequence", "created", "idempotency", "state"):
        with pytest.raises(ValueError):
            store.move(job.id, "queued", "leased", changes={name: getattr(job, name)})
    with pytest.raises(ValueError):
        store.move(job.id, "queued", "leased", changes={"prize": 1})
    assert store.job(job.id) == job


def test_an_engine_may_give_a_job_back_with_its_attempt(store: SqliteStore) -> None:
    job = job_in(store, "leased")
    back = store.move(job.id, "leased", "queued", changes={"attempt": job.attempt - 1})
    assert back is not None and back.attempt == 0
    assert [one.data["attempt"] for one in store.events(job.id)] == [0, 1, 0]


def test_of_two_that_move_a_job_one_does(tmp_path: Path) -> None:
    here = SqliteStore(tmp_path / "store")
    ids = [here.add(new_job()).id for _ in range(60)]
    won: dict[str, list[str]] = {"a": [], "b": []}
    go = threading.Barrier(2)

    def take(engine: str) -> None:
        other = SqliteStore(tmp_path / "store")
        mine = random.Random(engine).sample(ids, len(ids))
        go.wait()
        for id in mine:
            if other.move(id, "queued", "leased", changes={"engine": engine}) is not None:
                won[engine].append(id)
        other.close()

    threads = [threading.Thread(target=take, args=(name,)) for name in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won["a"] + won["b"]) == sorted(ids)
    for id in ids:
        job = here.job(id)
        assert job is not None and job.attempt == 1 and id in won[job.engine]
        assert said(here, id) == [(1, "queued"), (2, "leased")]
    here.close()


# Adding and finding.


def test_jobs_come_back_as_they_were_given(store: SqliteStore) -> None:
    price = Price(3, 2.5e12, 1e9, 5000, 4, 60, "trace", False, ("cd" * 32,))
    job = new_job(price=price, seconds=2.5, company=9, idempotency="k", body_bytes=77)
    kept = store.add(job)
    assert kept == replace(job, sequence=1, created=store.now())
    assert store.job(job.id) == kept and said(store, job.id) == [(1, "queued")]
    with pytest.raises(ValueError):
        store.add(new_job(state="leased"))
    with pytest.raises(sqlite3.IntegrityError):
        store.add(job if not job.idempotency else replace(job, idempotency=""))
    assert store.jobs() == [kept]


def test_all_fields_of_a_job_are_columns(tmp_path: Path, store: SqliteStore) -> None:
    with sqlite3.connect(tmp_path / "store") as db:
        columns = {row[1] for row in db.execute("pragma table_info(jobs)")}
    db.close()
    assert columns == {field.name for field in fields(JobRecord)} | {"reserved"}


def test_numbers_without_end_can_be_read_again(store: SqliteStore) -> None:
    job = store.add(new_job(price=Price(1, math.inf, math.nan, 2**80)))
    store.add(new_job(price=Price(1, 1.0, 1.0, 2**63 - 1)))
    assert 0 < job.price.operations < math.inf and job.price.result_bytes == 2**80
    assert store.reserved() > 2**62 and store.usage("ada")["reserved"] > 2**62
    problem = Problem("limit", "Limit", 413, "No.", found=math.inf, retry_after=math.nan)
    failed = store.move(job.id, "queued", "failed", changes={"problem": problem})
    found = store.job(job.id)
    assert found is not None and failed is not None and found.problem is not None
    assert found.problem.detail == "No." and found.problem.retry_after == 0


def test_an_idempotency_key_stands_for_one_job_of_a_tenant(store: SqliteStore) -> None:
    first = store.add(new_job(idempotency="once"))
    assert store.add(new_job(idempotency="once")) == first
    assert store.add(new_job(idempotency="once", tenant="bo")).id != first.id
    assert store.add(new_job()).id != store.add(new_job()).id
    store.move(first.id, "queued", "cancelled", changes={"expires": store.now() + 1})
    ended = store.add(new_job(idempotency="once"))
    assert (ended.id, ended.state) == (first.id, "cancelled")
    assert len(store.jobs("ada")) == 3 and len(said(store, first.id)) == 2
    store.forget(store.now() + 2)
    assert store.add(new_job(idempotency="once")).id != first.id


def test_of_two_that_send_one_key_both_get_the_same_job(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "store").close()
    got: list[list[str]] = []
    go = threading.Barrier(2)

    def send() -> None:
        store = SqliteStore(tmp_path / "store")
        go.wait()
        got.append([store.add(new_job(idempotency=str(key))).id for key in range(40)])
        store.close()

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got[0] == got[1] and len({*got[0]}) == 40


def test_jobs_are_listed_by_pages(store: SqliteStore) -> None:
    made = [job_in(store, state, tenant=who) for state in STATES for who in ("ada", "bo")]
    assert store.jobs() == made[::-1]
    assert store.jobs("bo") == made[::-1][::2]
    assert {job.state for job in store.jobs("ada", ("done", "queued"))} == {"done", "queued"}
    pages, before = list[JobRecord](), None
    while page := store.jobs("ada", before=before, limit=2):
        assert len(page) <= 2
        pages += page
        before = page[-1].sequence
    assert pages == store.jobs("ada")
    other = store.add(new_job(model="other"))
    assert store.waiting("other") == [other]
    queued = [job for job in made if job.state == "queued"]
    assert store.waiting("insitu/eiffel") == queued
    assert [store.ahead(job) for job in (*queued, other)] == [0, 1, 0]


def test_a_sequence_is_never_used_twice(store: SqliteStore) -> None:
    job = job_in(store, "cancelled")
    store.move(store.add(new_job()).id, "queued", "cancelled", changes={"expires": 1.0})
    assert len(store.forget(2.0)) == 1
    assert store.add(new_job()).sequence == job.sequence + 2


# Leases and the clock.


def test_a_lease_ends_unless_it_is_renewed(store: SqliteStore, clocks: Clocks) -> None:
    jobs = [job_in(store, state) for state in ("leased", "running")]
    other = job_in(store, "running", engine="e2")
    clocks.pass_by(29)
    assert store.overdue() == [] and store.renew("e1", 30) == 2 and store.renew("e3", 30) == 0
    clocks.pass_by(2)
    assert store.overdue() == [other]
    clocks.pass_by(29)
    assert {job.id for job in store.overdue()} == {other.id, *(job.id for job in jobs)}


def test_a_job_that_somebody_has_without_a_lease_is_overdue(store: SqliteStore) -> None:
    job = store.add(new_job())
    leased = store.move(job.id, "queued", "leased", changes={"engine": "e1"})
    assert store.overdue() == [leased]


@pytest.mark.parametrize("moved", [-1e9, -3600.0, 3600.0, 1e9])
def test_a_clock_that_is_set_ends_no_lease_and_keeps_none(
    store: SqliteStore, clocks: Clocks, moved: float
) -> None:
    before = store.now()
    job = job_in(store, "running")
    ended = job_in(store, "failed")
    store.move(store.add(new_job()).id, "queued", "failed", changes={"expires": before + 100})
    clocks.wall += moved
    assert store.now() == before
    clocks.pass_by(29)
    assert store.overdue() == [] and store.forget(store.now()) == []
    clocks.pass_by(2)
    assert [one.id for one in store.overdue()] == [job.id]
    clocks.pass_by(70)
    assert len(store.forget(store.now())) == 1 and store.job(ended.id) == ended


@pytest.mark.parametrize("off", [-1e9, -3600.0, 0.0, 3600.0, 1e9])
def test_what_is_to_come_is_as_far_away_after_a_start(
    tmp_path: Path, clocks: Clocks, off: float
) -> None:
    first = SqliteStore(tmp_path / "s", clock=clocks.made())
    running = job_in(first, "running")
    done = {"expires": first.now() + 100}
    ended = first.move(first.add(new_job()).id, "queued", "failed", changes=done)
    first.grant("ada", "ef" * 32, 5)
    first.close()
    clocks.wall += off
    clocks.steady = 3.0  # the machine was started anew
    store = SqliteStore(tmp_path / "s", clock=clocks.made())
    start = clocks.wall
    assert store.now() == start and ended is not None
    assert store.overdue() == [] and store.forget(store.now()) == []
    kept = store.job(ended.id)
    assert kept is not None and kept.expires == start + 100 and kept.ended == ended.ended
    clocks.pass_by(31)
    assert [job.id for job in store.overdue()] == [running.id]
    assert store.release(start) == [] and store.release(start + 1) == ["ef" * 32]
    clocks.pass_by(70)
    assert [job.id for job in store.forget(store.now())] == [ended.id]
    store.close()


def test_a_store_that_was_not_closed_goes_on_too(tmp_path: Path, clocks: Clocks) -> None:
    first = SqliteStore(tmp_path / "s", clock=clocks.made())
    job = job_in(first, "running")
    clocks.pass_by(10)
    first.renew("e1", 30)
    clocks.wall -= 1e6
    second = SqliteStore(tmp_path / "s", clock=clocks.made())
    clocks.pass_by(29)
    assert second.overdue() == []
    clocks.pass_by(2)
    assert [one.id for one in second.overdue()] == [job.id]
    first.close()
    second.close()


# Giving back.


def test_what_a_dead_engine_had_is_queued_with_less_company(store: SqliteStore) -> None:
    jobs = [job_in(store, state) for state in ("leased", "running", "queued", "done")]
    other = job_in(store, "running", engine="e2")
    company = {jobs[0].id: 3, jobs[2].id: 0, other.id: 0}
    given = store.give_back("e1", company, DIED)
    assert [(job.id, job.state, job.attempt, job.company) for job in given] == [
        (jobs[0].id, "queued", 1, 3),
        (jobs[1].id, "queued", 1, 1000),
    ]
    assert all((job.engine, job.lease_until) == ("", None) for job in given)
    assert store.job(other.id) == other and store.job(jobs[2].id) == jobs[2]
    assert store.give_back("e1", company, DIED) == []
    assert [state for _, state in said(store, jobs[1].id)] == [
        "queued", "leased", "running", "queued",
    ]  # fmt: skip


def test_a_job_is_begun_so_often_and_then_fails(store: SqliteStore) -> None:
    job = store.add(new_job())
    for attempt in range(1, MOST_ATTEMPTS + 1):
        engine = f"e{attempt}"
        leased = store.move(job.id, "queued", "leased", changes={"engine": engine})
        assert leased is not None and leased.attempt == attempt
        store.move(job.id, "leased", "running", attempt=attempt)
        (given,) = store.give_back(engine, {job.id: 8 >> attempt}, DIED)
        assert given.company == (8 >> attempt if attempt < MOST_ATTEMPTS else 2)
    assert (given.state, given.problem, given.ended) == ("failed", DIED, store.now())
    assert said(store, job.id)[-1] == (len(store.events(job.id)), "failed")
    assert store.move(job.id, "running", "done", attempt=MOST_ATTEMPTS) is None


# Events.


def test_events_are_numbered_one_by_one_until_the_end(store: SqliteStore) -> None:
    job, other = job_in(store, "running"), job_in(store, "running")
    for number in range(4, 24):
        event = store.tell(job.id, "token", {"step": number, "ids": [number]}, attempt=1)
        assert event is not None and event.number == number
        assert store.tell(other.id, "progress", {"done": 0.5}) is not None
    assert store.tell(job.id, "token", {}, attempt=2) is None
    store.move(job.id, "running", "done")
    assert store.tell(job.id, "token", {}) is None and store.tell("0" * 32, "token", {}) is None
    events = store.events(job.id)
    assert [one.number for one in events] == [*range(1, 25)]
    assert (events[-1].kind, events[-1].data["state"]) == ("state", "done")
    assert store.events(job.id, after=20) == events[20:]
    assert store.events(job.id, after=5, limit=2) == events[5:7]
    assert store.events(job.id, after=24) == [] and store.events("0" * 32) == []


def test_tokens_do_not_wait_for_the_disk_and_jobs_do(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "s", durable=True)
    db = store._db._db
    modes, mode = list[str](), "full"

    def traced(statement: str) -> None:
        nonlocal mode
        if statement.startswith("pragma synchronous = "):
            mode = statement.removeprefix("pragma synchronous = ")
        elif statement.startswith(("insert into events", "commit")):
            modes.append(mode)

    job = job_in(store, "running")
    db.set_trace_callback(traced)
    store.tell(job.id, "token", {})
    assert modes == ["normal"]
    modes.clear()
    store.renew("e1", 30)
    assert modes == ["normal"]
    modes.clear()
    store.move(job.id, "running", "done")
    assert modes == ["full", "full"]
    assert db.execute("pragma synchronous").fetchone() == (2,)
    store.close()


def test_only_ended_jobs_are_forgotten_with_all_that_is_theirs(store: SqliteStore) -> None:
    ended = {"expires": store.now() + 10, "result": "cd" * 32, "result_bytes": 30}
    early = job_in(store, "running", body_bytes=5)
    done = store.move(early.id, "running", "done", changes=ended)
    late = store.move(store.add(new_job()).id, "queued", "failed", changes={"expires": 9e9 * 2})
    waits = store.add(new_job(expires=1.0))
    assert store.forget(store.now()) == []
    assert store.forget(store.now() + 11) == [done]
    assert store.job(early.id) is None and store.events(early.id) == []
    assert store.jobs() == [waits, late] and store.usage("ada")["stored"] == 0


# Blobs, files and usage.


def test_tensors_are_a_tenants_own_and_stay_while_they_are_needed(
    store: SqliteStore, clocks: Clocks
) -> None:
    one, two, three = ("1" * 64, "2" * 64, "3" * 64)
    for digest in (one, two, three):
        store.grant("ada", digest, 100)
    store.grant("bo", two, 100)
    assert store.has_blob("ada", one) and not store.has_blob("bo", one)
    job = store.add(new_job(price=Price(1, 1.0, 1.0, 1, blobs=(one, one))))
    clocks.pass_by(100)
    assert store.has_blob("bo", two)  # which is a use of it
    assert store.release(store.now() - 50) == [three]  # bo has the second, a job needs the first
    assert not store.has_blob("ada", two) and store.has_blob("bo", two)
    assert store.refers(one) and store.refers(two) and not store.refers(three)
    store.move(job.id, "queued", "cancelled")
    clocks.pass_by(100)
    assert store.release(store.now()) == [one, two] and store.usage("ada")["stored"] == 0


def test_files_are_needed_as_long_as_a_job_has_them(store: SqliteStore) -> None:
    body, result = "1" * 64, "2" * 64
    first, second = (job_in(store, "running", body=body) for _ in range(2))
    assert store.refers(body) and not store.refers(result) and not store.refers("")
    done = {"result": result, "expires": 1.0}
    store.move(first.id, "running", "done", changes=done)
    assert store.refers(result)
    store.forget(2.0)
    assert store.refers(body) and not store.refers(result)
    store.move(second.id, "running", "failed", changes={"expires": 1.0})
    store.forget(2.0)
    assert not store.refers(body)


def test_what_is_stored_is_the_sum_whatever_happens(store: SqliteStore, clocks: Clocks) -> None:
    dice = random.Random(0)
    for _ in range(300):
        clocks.pass_by(dice.random() * 3)
        match dice.randrange(5):
            case 0:
                store.add(new_job(tenant=dice.choice("ab"), body_bytes=dice.randrange(100)))
            case 1 if waiting := store.waiting("insitu/eiffel"):
                changes = {"result_bytes": dice.randrange(100), "expires": store.now() + 20}
                store.move(dice.choice(waiting).id, "queued", "failed", changes=changes)
            case 2:
                store.forget(store.now())
            case 3:
                store.grant(dice.choice("ab"), f"{dice.randrange(8):064}", 50)
            case _:
                store.release(store.now() - 20)
        rows = store._db.rows("select tenant, digest from grants")
        for tenant in "ab":
            jobs = store.jobs(tenant, limit=1000)
            size = sum(job.body_bytes + job.result_bytes for job in jobs)
            size += 50 * sum(who == tenant for who, _ in rows)
            usage = store.usage(tenant)
            assert usage["stored"] == size
            assert usage["queued"] == sum(job.state == "queued" for job in jobs)
            assert usage["reserved"] == 1000 * usage["queued"]


def test_usage_is_of_a_day(store: SqliteStore, clocks: Clocks) -> None:
    assert store.usage("ada")["operations"] == 0
    store.used("ada", operations=5, received=2)
    store.used("ada", operations=1.5, sent=4, seconds=0.5)
    store.used("bo", operations=7)
    job_in(store, "leased")
    found = store.usage("ada")
    assert [found[name] for name in ("operations", "seconds", "received", "sent")] == [
        6.5, 0.5, 2, 4,
    ]  # fmt: skip
    assert (found["queued"], found["running"], found["reserved"]) == (0, 1, 1000)
    clocks.pass_by(24 * 3600)
    assert store.usage("ada")["operations"] == 0
    with pytest.raises(ValueError):
        store.used("ada", operation=5)


def test_tenants_and_keys_come_back_as_they_were_given(store: SqliteStore) -> None:
    ada = Tenant("1", "ada", 2.5, {"queued_jobs": 3, "stored_bytes": math.inf})
    key = Key("insitu_aaaaaaaa", "f" * 64, "1", frozenset(("jobs", "admin")), 5.0, True)
    store.put_tenant(ada)
    store.put_tenant(bo := Tenant("2", "bo"))
    store.put_key(key)
    assert store.tenants() == [ada, bo] and store.tenant("1") == ada
    assert store.keys() == [key] and store.key(key.prefix) == key
    store.put_tenant(replace(ada, name="Ada"))
    store.put_key(replace(key, revoked=False))
    assert store.tenant("1") == replace(ada, name="Ada")
    assert store.key(key.prefix) == replace(key, revoked=False)
    assert store.tenant("3") is None and store.key("insitu_b") is None
    assert (store.strike("1"), store.strike("1")) == (1, 2)
    found = store.tenant("1")
    assert found is not None and found.strikes == 2
    with pytest.raises(KeyError):
        store.strike("3")


# The file.


def test_what_was_committed_is_there_after_a_start(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "s")
    job = job_in(first, "done", expires=5.0)
    events = first.events(job.id)
    first.close()
    second = SqliteStore(tmp_path / "s")
    found = second.job(job.id)
    assert found is not None and replace(found, expires=5.0) == job
    assert second.events(job.id) == events
    second.close()


def test_only_this_user_can_read_the_store(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        store = SqliteStore(tmp_path / "s")
        store.add(new_job())
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        store.close()
    finally:
        os.umask(mask)
    assert modes == {"s": 0o600, "s-wal": 0o600, "s-shm": 0o600}


def test_a_newer_or_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = SqliteStore(path)
    job = store.add(new_job())
    store.close()
    with sqlite3.connect(path) as db:
        db.execute(f"pragma user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(LoadError, match=f"version {VERSION + 1} .* reads version {VERSION}"):
        SqliteStore(path)
    with sqlite3.connect(path) as db:
        db.execute(f"pragma user_version = {VERSION}")
    db.close()
    store = SqliteStore(path)
    assert store.job(job.id) == job
    store.close()
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("create table jobs (id)")
    db.close()
    with pytest.raises(LoadError, match="another program"):
        SqliteStore(tmp_path / "other")
    (tmp_path / "text").write_text("no database " * 1000)
    with pytest.raises(LoadError, match="cannot be opened"):
        SqliteStore(tmp_path / "text")


def test_a_full_disk_changes_nothing_and_is_said(store: SqliteStore) -> None:
    jobs = [job_in(store, "running") for _ in range(3)]
    (pages,) = store._db.rows("pragma page_count")[0]
    store._db.rows(f"pragma max_page_count = {pages}")
    long = Problem("x", "X", 500, "long " * 20_000)
    for act in (
        lambda: store.move(jobs[0].id, "running", "failed", changes={"problem": long}),
        lambda: store.tell(jobs[0].id, "value", {"text": "long " * 20_000}),
        lambda: store.add(new_job(idempotency="long " * 20_000)),
    ):
        with pytest.raises(ProblemError) as raised:
            act()
        assert (raised.value.problem.code, raised.value.problem.status) == ("storage", 507)
    assert store.jobs() == jobs[::-1] and len(store.events(jobs[0].id)) == 3
    store._db.rows(f"pragma max_page_count = {pages * 100}")
    assert store.move(jobs[0].id, "running", "failed", changes={"problem": long}) is not None
    assert len(store.jobs()) == 3


def test_the_table_of_states_has_no_way_out_of_an_end() -> None:
    assert not {before for before, _ in FOLLOWS} & ENDS
    assert {state for pair in FOLLOWS for state in pair} == {*STATES}
    assert len([*itertools.product(STATES, STATES)]) == 49


def test_changes_together_are_all_made_or_none(store: SqliteStore) -> None:
    first, second = store.add(new_job()), store.add(new_job())
    with store.together():
        store.move(first.id, "queued", "leased")
        store.tell(first.id, "progress", {"done": 0.5})
        store.used("ada", operations=5.0)
    found = store.job(first.id)
    assert found is not None and found.state == "leased"
    assert store.usage("ada")["operations"] == 5.0
    events = len(store.events(first.id))
    with pytest.raises(KeyError), store.together():
        store.move(first.id, "leased", "running")
        store.move(second.id, "queued", "leased")
        store.used("ada", operations=5.0)
        raise KeyError
    for job, state in ((first, "leased"), (second, "queued")):
        found = store.job(job.id)
        assert found is not None and found.state == state
    assert store.usage("ada")["operations"] == 5.0
    assert len(store.events(first.id)) == events


def test_a_failure_of_a_part_is_one_of_the_whole_even_if_it_is_suppressed(
    store: SqliteStore,
) -> None:
    job = store.add(new_job())
    with pytest.raises(KeyError), store.together():
        store.move(job.id, "queued", "leased")
        with contextlib.suppress(KeyError), store.together():
            raise KeyError
        with contextlib.suppress(KeyError):
            store.used("ada", operations=5.0)
    found = store.job(job.id)
    assert found is not None and found.state == "queued"
    assert store.usage("ada")["operations"] == 0.0
    store.used("ada", operations=5.0)
    assert store.usage("ada")["operations"] == 5.0
