"""Who runs next: counted in jobs, batches and operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.server.engines.scheduler import MOST_PASSED_OVER, Capacity, Scheduler
from insitu.server.records import JobRecord, Price, Tenant

pytestmark = pytest.mark.no_wire

ONE = Capacity(budget=1e9, speed=1.0, most_seconds=100.0, most_jobs=1)
EIGHT = replace(ONE, most_jobs=8)


def job(tenant: str = "a", operations: float = 1.0, **given: Any) -> JobRecord:
    """A job: fields of the record and of its price by name."""
    priced = {name: given.pop(name) for name in [*given] if hasattr(_PRICE, name)}
    price = replace(_PRICE, operations=operations, **priced)
    given.setdefault("priority", "interactive")
    given.setdefault("id", f"{next(_numbers):032x}")
    return JobRecord(tenant=tenant, model="m", state="queued", body="", price=price, **given)


_PRICE = Price(1, 1.0, 1.0, 1, joins="forward")
_numbers = iter(range(1 << 30))


@dataclass(eq=False)
class Front:
    """What a server does with a scheduler: jobs come, a batch is picked, and was run."""

    capacity: Capacity = EIGHT
    weights: dict[str, float] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    waiting: list[JobRecord] = field(default_factory=list)
    batches: list[list[JobRecord]] = field(default_factory=list)
    time: float = 0.0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler()
        self._count = 0

    def come(self, *jobs: JobRecord) -> None:
        for one in jobs:
            self._count += 1
            self.waiting.append(replace(one, sequence=self._count))

    def pick(self, capacity: Capacity | None = None) -> list[JobRecord]:
        names = {one.tenant for one in self.waiting}
        tenants = {
            name: Tenant(name, name, self.weights.get(name, 1.0), strikes=self.strikes.get(name, 0))
            for name in names
        }
        return self.scheduler.pick(self.waiting, tenants, capacity or self.capacity, self.time)

    def run(self, capacity: Capacity | None = None) -> list[JobRecord]:
        batch = self.pick(capacity)
        assert bool(batch) == bool(self.waiting)  # nobody waits beside a free engine
        gone = {one.id for one in batch}
        assert len(gone) == len(batch) and gone <= {one.id for one in self.waiting}
        self.waiting = [one for one in self.waiting if one.id not in gone]
        self.had = dict(self.scheduler.work)
        for one in batch:
            self.scheduler.charge(one.tenant, one.price.operations)
        self.batches.append(batch)
        self.time += 1.0
        return batch

    def until_empty(self) -> Iterator[list[JobRecord]]:
        while self.waiting:
            yield self.run()


def tenants(batch: Sequence[JobRecord]) -> str:
    return "".join(one.tenant[:1] for one in batch)


def work(batches: Sequence[Sequence[JobRecord]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in (one for batch in batches for one in batch):
        found[one.tenant] += one.price.operations  # pyright: ignore[reportArgumentType]
    return found


def test_nothing_is_picked_of_nothing() -> None:
    assert Scheduler().pick([], {}, EIGHT, 0.0) == []


def test_one_job_is_not_kept_waiting() -> None:
    front = Front()
    front.come(job())
    assert len(front.run()) == 1


def test_jobs_that_run_alike_are_picked_together_in_turns() -> None:
    front = Front()
    front.come(*[job("a") for _ in range(20)], *[job("b") for _ in range(20)], job("c"))
    batch = front.run()
    assert Counter(tenants(batch)) == {"a": 4, "b": 3, "c": 1}
    assert [one.sequence for one in batch if one.tenant == "a"] == [1, 2, 3, 4]  # its oldest


@pytest.mark.parametrize("capacity", [ONE, EIGHT])
@pytest.mark.parametrize("others", [1, 4])
def test_one_who_comes_with_single_jobs_waits_at_most_two_batches(
    capacity: Capacity, others: int
) -> None:
    front = Front(capacity)
    for number in range(others):
        front.come(*[job(f"a{number}") for _ in range(600)])
    for _ in range(20):
        for _ in range(2 * others):  # it does not ask for more than its share
            front.run()  # the last of these runs when it comes
        front.come(job("b"))
        front.run()
        assert "b" in tenants(front.batches[-1])


def test_weights_are_shares() -> None:
    for capacity in (ONE, EIGHT):
        front = Front(capacity, weights={"a": 3.0, "b": 1.0})
        front.come(*[job(name, 2.0) for name in "ab" * 200])
        for _ in range(160 // capacity.most_jobs):
            front.run()
        found = work(front.batches)
        assert found["a"] / found["b"] == pytest.approx(3.0, rel=0.1)


def test_work_is_shared_and_not_jobs() -> None:
    front = Front(ONE)
    front.come(*[job("a", 10.0) for _ in range(100)], *[job("b", 1.0) for _ in range(1000)])
    for _ in range(220):
        front.run()
    found = work(front.batches)
    assert found["a"] == pytest.approx(found["b"], rel=0.1)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_two_who_always_wait_differ_by_two_batches_at_most(data: Any) -> None:
    seconds, most = data.draw(st.integers(5, 50)), data.draw(st.integers(1, 10))
    front = Front(replace(ONE, most_seconds=float(seconds), most_jobs=most))
    for name in "ab":
        sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=40))
        front.come(*[job(name, float(one)) for one in sizes])
    largest = 0.0
    while {"a", "b"} == {*tenants(front.waiting)}:
        batch = front.run()
        largest = max(largest, sum(one.price.operations for one in batch))
        found = work(front.batches)
        assert abs(found["a"] - found["b"]) <= 2 * largest + 1e-6


def test_who_was_away_has_saved_nothing_up() -> None:
    front = Front(ONE)
    front.come(*[job("a") for _ in range(50)], job("b"))
    for _ in range(40):
        front.run()
    front.come(*[job("b") for _ in range(50)])
    for _ in range(10):
        front.run()
    assert Counter(tenants([batch[0] for batch in front.batches[-10:]])) == {"a": 5, "b": 5}
    assert front.scheduler.work["b"] == pytest.approx(front.scheduler.work["a"], abs=1.0)


def test_who_was_there_alone_owes_nothing_to_who_comes_then() -> None:
    front = Front(ONE)
    for _ in range(50):  # there is never another job of its own when it comes back
        front.come(job("a"))
        front.run()
    front.come(*[job(name) for name in "ab" * 10])
    for _ in range(10):
        front.run()
    assert Counter(tenants([batch[0] for batch in front.batches[-10:]])) == {"a": 5, "b": 5}


def test_what_did_not_run_is_refunded() -> None:
    front = Front(ONE)
    front.come(*[job(name, 5.0) for name in "aabb"])
    (first,) = front.run()
    front.scheduler.refund(first.tenant, 5.0)
    assert front.scheduler.work[first.tenant] == 0.0
    front.waiting.insert(0, first)
    assert front.run()[0].id == first.id


def test_what_was_used_is_forgotten_after_an_hour() -> None:
    front = Front(ONE)
    front.come(job("a", 1000.0), job("b", 1.0))
    front.run()
    front.run()
    assert front.scheduler.work["a"] == 1000.0
    front.time += 4000.0
    front.come(job("b", 1.0))
    front.run()
    assert "a" not in front.scheduler.work


def test_interactive_jobs_come_first_and_batch_has_a_tenth() -> None:
    for capacity in (ONE, EIGHT):
        front = Front(capacity)
        for name in "abc":
            front.come(*[job(name) for _ in range(400)])
        front.come(*[job("d", priority="batch") for _ in range(400)])
        for _ in range(400 // capacity.most_jobs):
            front.run()
        found = work(front.batches)
        assert found["d"] / sum(found.values()) == pytest.approx(0.1, abs=0.02)
        assert tenants(front.batches[0]).count("d") == 0


def test_a_large_batch_job_is_paid_for_by_its_class_but_not_for_ever() -> None:
    front = Front(replace(ONE, most_seconds=1.0))
    front.come(*[job("a") for _ in range(300)])
    front.come(job("d", 1000.0, priority="batch"), job("e", 1.0, priority="batch"))
    order = [front.run()[0].tenant for _ in range(130)]
    assert (order.index("d"), order.index("e")) == (1, 103)  # after ten batches' worth of a tenth


def test_batch_jobs_run_while_nobody_else_waits() -> None:
    front = Front()
    front.come(*[job("a", priority="batch") for _ in range(20)], job("b"))
    assert tenants(front.run()) == "b"  # not made slower by others
    assert tenants(front.run()) == "a" * 8


def test_only_jobs_that_run_alike_share_a_batch() -> None:
    front = Front()
    front.come(*[job("abc"[n % 3], joins=("x", "y", "")[n % 3]) for n in range(30)])
    for batch in front.until_empty():
        kinds = {one.price.joins for one in batch}
        assert len(kinds) == 1 and (kinds != {""} or len(batch) == 1)
    assert len(front.batches) == 10 + 2 + 2


def test_a_server_that_joins_nothing_runs_one_by_one() -> None:
    front = Front(replace(EIGHT, joins=False))
    front.come(*[job(name) for name in "abcabc"])
    assert [tenants(batch) for batch in front.until_empty()] == list("abcabc")


def test_who_has_ended_an_engine_runs_alone() -> None:
    front = Front(strikes={"b": 1})
    front.come(*[job(name) for name in "aabbccbb"])
    for batch in front.until_empty():
        assert "b" not in tenants(batch) or len(batch) == 1
    assert len(front.batches) == 5


def test_bytes_seconds_and_the_number_of_jobs_are_kept_to() -> None:
    front = Front(Capacity(budget=100.0, speed=10.0, most_seconds=2.0, most_jobs=5))
    front.come(*[job("a", 3.0, peak_bytes=1.0) for _ in range(30)])
    assert {len(batch) for batch in front.until_empty()} == {5}
    front.come(*[job("a", 7.0, peak_bytes=1.0) for _ in range(4)])
    assert [len(batch) for batch in front.until_empty()] == [2, 2]
    front.come(*[job("a", 1.0, peak_bytes=40.0) for _ in range(4)])
    assert [len(batch) for batch in front.until_empty()] == [2, 2]


def test_what_is_larger_than_a_batch_runs_alone() -> None:
    front = Front(Capacity(budget=100.0, speed=10.0, most_seconds=2.0))
    front.come(job("a", 50.0), job("b", 1.0), job("c", 1.0, peak_bytes=500.0), job("d", 1.0))
    assert sorted(tenants(batch) for batch in front.until_empty()) == ["a", "bd", "c"]


def test_a_job_has_no_more_company_than_it_may() -> None:
    front = Front()
    front.come(*[job(name) for name in "abc"], job("d", company=1), *[job(n) for n in "efg"])
    front.come(job("h", company=0))
    for batch in front.until_empty():
        assert all(len(batch) <= one.company + 1 for one in batch)
    assert [len(batch) for batch in front.batches if "d" in tenants(batch)] in ([1], [2])


def test_those_that_go_as_deep_are_together() -> None:
    front = Front(replace(EIGHT, most_jobs=4))
    for name in "abcdefgh":  # half of them end in an early layer
        operations = 12.0 if name in "aceg" else 1.0
        front.come(job(name, operations, positions=10))
    assert {*tenants(front.run())} == {*"aceg"}
    assert {*tenants(front.run())} == {*"bdfh"}
    front.come(job("a", 12.0, positions=10), job("b", 1.0, positions=10))
    assert {*tenants(front.run())} == {*"ab"}  # better than a pass each


def test_long_jobs_wait_while_one_runs_in_pieces() -> None:
    front = Front(Capacity(budget=1e9, speed=1.0, most_seconds=2.0))
    front.come(job("a", 50.0), job("b", 1.0))
    short = replace(front.capacity, only_short=True)
    assert tenants(front.run(short)) == "b"
    assert front.pick(short) == []
    for _ in range(20):
        front.come(job("b", 1.0))
        front.run(short)
    front.come(job("b", 1.0))
    assert tenants(front.run()) == "a"  # it has waited, and so has lost nothing


def test_one_that_fits_with_nobody_is_passed_over_eight_times_at_most() -> None:
    front = Front()
    front.come(job("a"), job("b", joins="other"))
    passed = 0
    while "b" in tenants(front.waiting):
        front.come(*[job("a") for _ in range(8)])
        # The others have never had anything before.
        front.come(*[job(f"{name}{passed}") for name in "cde"])
        passed += "b" not in tenants(front.run())
    assert passed <= MOST_PASSED_OVER


KINDS = st.tuples(
    st.sampled_from("abcd"),
    st.sampled_from(["interactive", "batch"]),
    st.sampled_from(["x", "x", "y", "z", ""]),
    st.floats(0.5, 40.0),
    st.floats(1.0, 150.0),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3, 1000]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(KINDS, max_size=6), min_size=1, max_size=40), st.integers(1, 6))
def test_random_loads(arrivals: list[list[Any]], most: int) -> None:
    """Every rule at once: all run, once, in batches that may be, and nobody is forgotten."""
    capacity = Capacity(budget=100.0, speed=10.0, most_seconds=2.0, most_jobs=most)
    front = Front(capacity, weights={"a": 2.0}, strikes={"d": 1})
    passed: Counter[str] = Counter()
    steps = [*arrivals, *[[]] * 2]
    while steps or front.waiting:
        for name, priority, joins, operations, peak, positions, company in (
            steps.pop(0) if steps else ()
        ):
            one = job(name, operations, priority=priority, joins=joins, peak_bytes=peak)
            price = replace(one.price, positions=positions)
            front.come(replace(one, price=price, company=company))
        if not front.waiting:
            continue
        waited = [*front.waiting]
        batch = front.run()
        taken = {one.id for one in batch}
        rivals = [one for one in waited if one.priority == batch[0].priority]
        assert front.had[batch[0].tenant] == min(front.had[one.tenant] for one in rivals)
        if len(batch) > 1:
            assert len(batch) <= min(most, *(one.company + 1 for one in batch))
            assert len({one.price.joins for one in batch} - {""}) == 1
            assert all(one.price.joins and one.tenant != "d" for one in batch)
            assert sum(one.price.peak_bytes for one in batch) <= 100.0
            assert sum(one.price.operations for one in batch) <= 20.0
        for at, one in enumerate(waited):
            later = [
                other
                for other in waited[at + 1 :]
                if (other.tenant, other.priority) == (one.tenant, one.priority)
            ]
            if one.id not in taken and any(other.id in taken for other in later):
                passed[one.id] += 1
                assert passed[one.id] <= MOST_PASSED_OVER
    assert sum(map(len, front.batches)) == sum(map(len, arrivals))


class Counted(list[JobRecord]):
    """Jobs that count how often they are gone through."""

    rounds = 0

    def __iter__(self) -> Iterator[JobRecord]:
        self.rounds += 1
        return super().__iter__()


def test_ten_thousand_jobs_are_gone_through_a_few_times_and_few_are_weighed() -> None:
    weighed = 0

    class Weighed(Price):
        def __getattribute__(self, name: str) -> Any:
            nonlocal weighed
            weighed += 1
            return super().__getattribute__(name)

    price = Weighed(1, 1.0, 1.0, 1, joins="forward")
    waiting = Counted(
        replace(job(f"t{n % 20}" if n % 2 else "a"), price=price, sequence=n) for n in range(10_000)
    )
    names = {one.tenant for one in waiting}
    waiting.rounds = 0
    scheduler = Scheduler()
    batch = scheduler.pick(waiting, {n: Tenant(n, n) for n in names}, EIGHT, 0.0)
    assert len(batch) == 8
    assert waiting.rounds <= 4
    assert weighed < 1_000
