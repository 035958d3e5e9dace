import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu import OptionError
from insitu.remote.problems import Problem, ProblemError
from insitu.server.limits import Recent, TenantLimits, Window, check_limits, may_run
from insitu.server.records import Price

NOON = 1_800_000_000.0 + 12 * 3600 - 1_800_000_000 % 86400
FREE = TenantLimits.of(dict.fromkeys(TenantLimits().as_dict(), math.inf))
PRICE = Price(1, 100.0, 1e6, 1000)


def problem(
    limits: TenantLimits,
    usage: dict[str, float] | None = None,
    price: Price | None = PRICE,
    now: float = NOON,
    recent: Recent | None = None,
    **others: Any,
) -> Problem | None:
    try:
        check_limits(limits, usage or {}, price, now, recent, **others)
    except ProblemError as error:
        return error.problem
    return None


def with_limit(**limits: float) -> TenantLimits:
    return replace(FREE, **limits)


# Which limits there are.


def test_limits_of_a_tenant_go_before_those_of_the_server() -> None:
    limits = TenantLimits.of(
        {"queued_jobs": 5, "running_jobs": 2, "stored_bytes": 10}, {"queued_jobs": 7}
    )
    assert (limits.queued_jobs, limits.running_jobs, limits.stored_bytes) == (7, 2, 10)
    assert limits.lengths_a_minute == TenantLimits().lengths_a_minute
    none = TenantLimits.of({"queued_jobs": 5}, {"queued_jobs": math.inf})
    assert none.queued_jobs is None and "queued_jobs" not in none.as_dict()
    assert TenantLimits.of(limits.as_dict()) == limits and FREE.as_dict() == {}
    with pytest.raises(OptionError, match="queued_jobs"):
        TenantLimits.of({"queued_job": 5})
    for wrong in (-1, math.nan):
        with pytest.raises(OptionError):
            TenantLimits.of({"queued_jobs": wrong})


def test_a_job_within_all_limits_passes() -> None:
    limits = TenantLimits(1, 1, 1000, 100, 100, 10, 1)
    assert problem(limits, received=0, lengths=1) is None
    limits = replace(limits, stored_bytes=1010)
    assert problem(limits, {"running": 5, "sent": 1e30}, received=10) is None
    assert problem(FREE, {"queued": 1e9, "stored": 1e30, "operations": 1e30}, received=1e30) is None


# What is too much.


@pytest.mark.parametrize(
    ("limits", "others", "found"),
    [
        ({"stored_bytes": 1009}, {"received": 10}, 1010),
        ({"operations_a_minute": 99}, {}, 100),
        ({"operations_a_day": 99}, {}, 100),
        ({"received_a_minute": 9}, {"received": 10}, 10),
        ({"lengths_a_minute": 2}, {"lengths": 3}, 3),
        ({"queued_jobs": 0}, {}, 1),
    ],
)
def test_what_can_never_fit_is_said_with_both_numbers(
    limits: dict[str, float], others: dict[str, Any], found: float
) -> None:
    ((name, allowed),) = limits.items()
    said = problem(with_limit(**limits), {"queued": 3}, **others)
    assert said is not None
    assert (said.code, said.status, said.retry_after) == ("never_fits", 413, 0)
    assert (said.limit, said.found, said.allowed) == (name, found, allowed)
    assert problem(with_limit(**{name: found}), {}, **others) is None


def test_what_is_too_much_now_is_said_with_a_time() -> None:
    said = problem(with_limit(queued_jobs=3), {"queued": 3}, turn=7.5)
    assert said is not None and (said.code, said.status) == ("quota", 429)
    assert (said.limit, said.found, said.allowed) == ("queued_jobs", 4, 3)
    assert 7.5 <= said.retry_after <= 7.7
    said = problem(with_limit(operations_a_day=150), {"operations": 60})
    assert said is not None and said.status == 429
    assert 12 * 3600 <= said.retry_after <= 12 * 3600 + 1
    said = problem(with_limit(stored_bytes=5000), {"stored": 3000, "reserved": 1500}, frees=30)
    assert said is not None and said.found == 5500 and 30 <= said.retry_after < 31
    # Nothing of it is going to be deleted: it does not help to try again.
    said = problem(with_limit(stored_bytes=5000), {"stored": 4500})
    assert said is not None and (said.status, said.retry_after) == (429, 0)


def test_of_several_limits_that_is_said_which_holds_longest() -> None:
    limits = with_limit(queued_jobs=1, operations_a_day=150, stored_bytes=2000)
    usage = {"queued": 1.0, "operations": 100.0}
    said = problem(limits, usage)
    assert said is not None and said.limit == "operations_a_day"
    said = problem(limits, {**usage, "stored": 1500.0})
    assert said is not None and (said.limit, said.retry_after) == ("stored_bytes", 0)
    said = problem(replace(limits, operations_a_day=50), {**usage, "stored": 1500.0})
    assert said is not None and (said.limit, said.status) == ("operations_a_day", 413)


def test_a_full_queue_does_not_keep_blobs_out() -> None:
    full = {"queued": 9.0, "operations": 1e9}
    limits = with_limit(queued_jobs=3, operations_a_day=5, operations_a_minute=5)
    assert problem(limits, full, price=None, received=10) is None
    said = problem(replace(limits, received_a_minute=9), full, price=None, received=10)
    assert said is not None and said.limit == "received_a_minute"


def test_more_than_may_run_wait_and_are_not_refused() -> None:
    limits = with_limit(running_jobs=2)
    assert problem(limits, {"running": 50}) is None
    assert may_run(limits, 1) and not may_run(limits, 2) and may_run(FREE, 10**9)


# Minutes.


def test_a_window_counts_the_last_minute() -> None:
    window = Window()
    for second in range(60):
        window.add(NOON + second + 0.5, 1.0)
        window.add(NOON + second + 0.7, 2.0)
    assert window.total(NOON + 59.9) == 180
    assert window.total(NOON + 60) == 177
    assert window.total(NOON + 89) == 90
    assert window.total(NOON + 119) == 0


amounts = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0, 100, allow_subnormal=False)), max_size=30
)


@given(amounts, st.floats(0, 120), st.floats(10, 300), st.floats(0, 86400))
def test_after_the_time_that_is_said_it_is_taken_and_not_before(
    earlier: list[tuple[float, float]], amount: float, allowed: float, start: float
) -> None:
    limits = with_limit(operations_a_minute=allowed)
    price = replace(PRICE, operations=amount)
    recent, now = Recent(), NOON + start
    moments = list[tuple[float, float]]()
    for pause, spent in earlier:
        now += pause
        recent.add(now, operations=spent)
        moments.append((now, spent))
    said = problem(limits, price=price, now=now, recent=recent)
    if amount > allowed:
        assert said is not None and said.status == 413
        return
    surely = math.fsum(spent for moment, spent in moments if now - moment < 59)
    if said is None:
        assert surely + amount <= allowed or not amount
        return
    assert (said.code, said.status) == ("quota", 429) and 0 < said.retry_after <= 60.2
    then = now + said.retry_after
    if said.retry_after > 0.3:
        assert problem(limits, price=price, now=then - 0.3, recent=recent) is not None
    assert problem(limits, price=price, now=then, recent=recent) is None


@given(amounts, st.floats(1, 50))
def test_no_minute_has_more_than_is_allowed(
    asked: list[tuple[float, float]], allowed: float
) -> None:
    limits = with_limit(received_a_minute=allowed)
    recent, now = Recent(), NOON
    taken = list[tuple[float, float]]()
    for pause, amount in asked:
        now += pause
        if problem(limits, price=None, now=now, recent=recent, received=amount) is None:
            recent.add(now, received=amount)
            taken.append((now, amount))
    for end, _ in taken:  # seconds are counted whole, so a minute is at least 59 of them
        within = [amount for moment, amount in taken if end - 59 < moment <= end]
        assert math.fsum(within) <= allowed * (1 + 1e-12)


def test_a_window_takes_little_memory() -> None:
    window = Window()
    for number in range(10_000):
        window.add(NOON + number / 10, 1.0)
        window.total(NOON + number / 10)
    assert len(window._seconds) <= 61
