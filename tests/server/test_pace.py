"""How fast an engine is taken to be, and when it waits a moment for more jobs."""

from dataclasses import replace

import pytest

from insitu.server.engines.messages import Ready
from insitu.server.pace import MOST_SECONDS, MOST_SHARE, Company, Pace, Speeds
from insitu.server.records import JobRecord, Price
from tests.server.stores import new_job


def job(operations: float = 10.0, joins: str = "alike", invocations: int = 1) -> JobRecord:
    price = Price(1, operations, 100.0, 10, invocations, joins=joins)
    return replace(new_job(), price=price)


def pace(speed: float = 1000.0) -> Pace:
    return Pace(Ready(1, 10_000, speed, "float32"))


def test_a_speed_is_what_was_measured_until_batches_say_another() -> None:
    speeds = Speeds(100.0)
    assert speeds.of("a") == 100.0
    for _ in range(30):
        speeds.saw("a", 400.0, 2.0)
    assert speeds.of("a") == pytest.approx(200.0, rel=0.01)
    assert speeds.of("b") == 100.0


def test_large_batches_say_more_of_a_speed_than_small_ones() -> None:
    speeds = Speeds(100.0)
    for _ in range(30):
        speeds.saw("a", 1.0, 0.1)
        speeds.saw("a", 1000.0, 5.0)
    assert speeds.of("a") > 190.0


def test_no_more_speeds_are_kept_than_are_of_use() -> None:
    speeds = Speeds(100.0)
    for kind in range(1000):
        speeds.saw(str(kind), 10.0, 1.0)
    assert len(speeds.all()) < 100


def test_a_batch_without_operations_says_nothing() -> None:
    speeds = Speeds(100.0)
    speeds.saw("a", 0.0, 1.0)
    assert speeds.of("a") == 100.0


def test_who_has_just_had_an_answer_is_waited_for_and_for_no_longer_than_it_pays() -> None:
    company = Company()
    assert company.seconds_left(0.0) == 0.0
    company.batch_ended(10.0, 0.2, 8)
    assert company.seconds_left(10.0) == pytest.approx(MOST_SHARE * 0.2)
    assert company.seconds_left(10.0 + MOST_SHARE * 0.2) == 0.0
    company.batch_ended(20.0, 1e6, 8)
    assert company.seconds_left(20.0) == pytest.approx(MOST_SECONDS)


def test_nobody_is_waited_for_once_all_have_come_back() -> None:
    company = Company()
    company.batch_ended(10.0, 0.2, 2)
    company.came(10.001)
    assert company.seconds_left(10.001) > 0
    company.came(10.002)
    assert company.seconds_left(10.002) == 0.0


def test_as_many_are_waited_for_as_use_to_come_back() -> None:
    company = Company()
    for at in range(40):
        company.batch_ended(float(at), 0.2, 8)
        for _ in range(6):
            company.came(at + 0.01)
    company.batch_ended(40.0, 0.2, 8)
    for number in range(6):
        assert company.seconds_left(40.01) > 0, number
        company.came(40.01)
    assert company.seconds_left(40.01) == 0.0


def test_users_who_do_not_come_back_are_not_waited_for_until_they_do() -> None:
    company = Company()
    for at in range(20):
        company.batch_ended(float(at), 0.2, 4)
    assert company.seconds_left(19.0) == 0.0
    for at in range(20, 40):
        company.batch_ended(float(at), 0.2, 4)
        for _ in range(4):
            company.came(at + 0.01)
    company.batch_ended(40.0, 0.2, 4)
    assert company.seconds_left(40.0) > 0


def test_jobs_that_fill_a_batch_wait_for_nobody() -> None:
    one = pace()
    one.ended(0.0, 0.2, [job()] * 4)
    assert one.seconds_to_wait(0.0, [job()], True) > 0
    assert one.seconds_to_wait(0.0, [job(500.0)] * 2, True) == 0.0
    assert one.seconds_to_wait(0.0, [job(0.1)] * 63, True) > 0
    assert one.seconds_to_wait(0.0, [job(0.1)] * 64, True) == 0.0


def test_jobs_that_share_no_passes_wait_for_nobody() -> None:
    one = pace()
    one.ended(0.0, 0.2, [job()] * 4)
    assert one.seconds_to_wait(0.0, [job()], False) == 0.0
    assert one.seconds_to_wait(0.0, [job(joins="")], True) == 0.0


def test_what_an_engine_can_take_follows_what_it_has_done() -> None:
    one = pace(1000.0)
    before = one.capacity(True, False).operations_of(job())
    for at in range(30):
        one.ended(float(at), 1.0, [job(4000.0)])
    assert one.capacity(True, False).operations_of(job()) == pytest.approx(4 * before, rel=0.01)
    assert one.capacity(True, False).operations_of(job(joins="others")) == before


def test_a_long_job_runs_in_pieces_that_take_as_long_as_a_batch_may() -> None:
    one = pace(1000.0)
    assert one.piece([job(400.0, invocations=100)]) == 0
    assert one.piece([job(5000.0, invocations=100)]) == 10
    assert one.piece([job(5000.0)]) == 0
    assert one.piece([job(5000.0, invocations=100), job()]) == 0
