"""What a tenant may take: how much of it, and when it may go on.

What one job may take is another matter: `insitu.engine.limits`. All here is computed from numbers
that are given, the time too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from insitu.graph.errors import OptionError, nearest
from insitu.remote.problems import Problem, ProblemError
from insitu.server.records import Price

_DAY = 24 * 3600.0
_MINUTE = 60


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What a tenant may take; a field that is None has no limit.

    Attributes:
        queued_jobs: jobs that wait.
        running_jobs: jobs that run at once. More of them wait: none is refused for that.
        stored_bytes: bytes of jobs, results and blobs that are kept, with the results to come.
        operations_a_minute: floating-point operations of the jobs that it sends in a minute.
        operations_a_day: those of a day of UTC.
        received_a_minute: bytes that it sends in a minute, jobs and blobs.
        lengths_a_minute: lengths of prompts that no job had before. To find out what one takes
            keeps a processor busy for about a quarter of a second.
    """

    queued_jobs: float | None = 1_000
    running_jobs: float | None = None
    stored_bytes: float | None = 64 * 2**30
    operations_a_minute: float | None = None
    operations_a_day: float | None = None
    received_a_minute: float | None = 16 * 2**30
    lengths_a_minute: float | None = 120

    @classmethod
    def of(cls, *given: Mapping[str, float]) -> TenantLimits:
        """Returns the limits that some mappings say, a later one before an earlier.

        Args:
            given: limits by name: those of the server, then those of a tenant. Infinity is no
                limit.

        Raises:
            OptionError: if there is no such limit, or if it is no number that can be one.
        """
        names = [field.name for field in fields(cls)]
        found: dict[str, Any] = {}
        for limits in given:
            for name, value in limits.items():
                if name not in names:
                    raise OptionError(
                        f"{name!r} is no limit of a tenant{nearest(name, names)}: there are "
                        f"{', '.join(names)}."
                    )
                if not value >= 0:
                    raise OptionError(f"The limit {name!r} is {value!r}: 0 or more is one.")
                found[name] = None if math.isinf(value) else value
        return cls(**found)

    def as_dict(self) -> dict[str, float]:
        """Returns the limits by name; those that do not hold are not among them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


class Window:
    """Amounts of the last minute, added up by the second.

    An amount counts for up to a second less than the minute, so that the time at which there is
    room again is true to the second.
    """

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, float]] = deque()

    def add(self, now: float, amount: float) -> None:
        """Adds an amount.

        Args:
            now: the time, which never is before that of an earlier call.
            amount: the amount.
        """
        second = math.floor(now)
        if self._seconds and self._seconds[-1][0] == second:
            amount += self._seconds.pop()[1]
        self._seconds.append((second, amount))

    def total(self, now: float) -> float:
        """Returns the amount of the last minute.

        Args:
            now: the time.
        """
        while self._seconds and now - self._seconds[0][0] >= _MINUTE:
            self._seconds.popleft()
        return math.fsum(amount for _, amount in self._seconds)

    def wait(self, now: float, amount: float, allowed: float) -> float:
        """Returns after how many seconds an amount can be added, if nothing else is until then.

        Args:
            now: the time.
            amount: the amount.
            allowed: how much there may be in a minute.

        Returns:
            The seconds; infinity if it is more than there may ever be.
        """
        if amount > allowed:
            return math.inf
        left = self.total(now)
        if left + amount <= allowed:
            return 0.0
        for place, (second, _) in enumerate(self._seconds, 1):
            # Added up anew, as `total` will: a difference could be off by a rounding error.
            left = math.fsum(one for _, one in [*self._seconds][place:])
            if left + amount <= allowed:
                return second + _MINUTE - now
        raise AssertionError("nothing is left, and still too much")


class Recent:
    """What a tenant has taken in the last minute.

    A server keeps one for each tenant, in memory: with a new start the minute begins anew.

    Attributes:
        operations: floating-point operations of jobs that were accepted.
        received: bytes.
        lengths: lengths of prompts that were new.
    """

    def __init__(self) -> None:
        self.operations, self.received, self.lengths = Window(), Window(), Window()

    def add(
        self, now: float, operations: float = 0.0, received: float = 0.0, lengths: float = 0.0
    ) -> None:
        """Adds what was taken.

        Args:
            now: the time.
            operations: floating-point operations.
            received: bytes.
            lengths: new lengths.
        """
        for window, amount in (
            (self.operations, operations),
            (self.received, received),
            (self.lengths, lengths),
        ):
            if amount:
                window.add(now, amount)


@dataclass(frozen=True, slots=True)
class _Passed:
    """A limit that is passed, and after how many seconds it no longer is; 0 for not by waiting."""

    limit: str
    found: float
    allowed: float
    wait: float


def check_limits(
    limits: TenantLimits,
    usage: Mapping[str, float],
    price: Price | None,
    now: float,
    recent: Recent | None = None,
    *,
    received: float = 0.0,
    lengths: float = 0.0,
    turn: float = 1.0,
    frees: float = 0.0,
) -> None:
    """Raises if a tenant may not have something now, or ever.

    Args:
        limits: what it may take.
        usage: what it has taken, as `Store.usage` says.
        price: what its job takes; None before that is known, or for a blob.
        now: the time, of the store's clock.
        recent: what it has taken in the last minute; None to leave that out.
        received: bytes that it sends now, and that are going to be stored.
        lengths: how many lengths of its prompts are new.
        turn: after about how many seconds one of its jobs begins to run.
        frees: after how many seconds something of what it has stored is deleted, 0 if unknown.

    Raises:
        ProblemError: 413 "never_fits" for a job that is more than a limit at any time, and 429
            "quota" for one that is too much now. `retry_after` holds if it sends nothing else
            meanwhile; of several limits it is that which takes longest.
    """
    recent = recent or Recent()
    operations = 0.0 if price is None else price.operations
    size = received + (0 if price is None else price.result_bytes)
    stored = usage.get("stored", 0.0) + usage.get("reserved", 0.0)
    asked = [
        _passed("stored_bytes", limits.stored_bytes, stored, size, frees),
        _passed(
            "operations_a_day",
            limits.operations_a_day,
            usage.get("operations", 0.0),
            operations,
            _DAY - now % _DAY,
        ),
        _in_minute("operations_a_minute", limits.operations_a_minute, recent.operations, now,
                   operations),
        _in_minute("received_a_minute", limits.received_a_minute, recent.received, now, received),
        _in_minute("lengths_a_minute", limits.lengths_a_minute, recent.lengths, now, lengths),
    ]  # fmt: skip
    if price is not None:
        queued = usage.get("queued", 0.0)
        asked.append(_passed("queued_jobs", limits.queued_jobs, queued, 1, max(turn, 1.0)))
    passed = [one for one in asked if one is not None]
    if passed:
        # What never fits before all, then what does not help to wait for.
        worst = max(passed, key=lambda one: (math.isinf(one.wait), one.wait or math.inf))
        raise ProblemError(_problem(worst))


def may_run(limits: TenantLimits, running: int) -> bool:
    """Returns whether another job of a tenant may begin to run.

    Args:
        limits: what it may take.
        running: how many run.
    """
    return limits.running_jobs is None or running < limits.running_jobs


def _passed(
    limit: str, allowed: float | None, there: float, more: float, wait: float
) -> _Passed | None:
    if allowed is None or not more or there + more <= allowed:
        return None
    if more > allowed:
        return _Passed(limit, more, allowed, math.inf)
    return _Passed(limit, there + more, allowed, wait)


def _in_minute(
    limit: str, allowed: float | None, window: Window, now: float, more: float
) -> _Passed | None:
    there = window.total(now)
    found = _passed(limit, allowed, there, more, 1.0)
    if found is None or allowed is None or math.isinf(found.wait):
        return found
    return _Passed(limit, found.found, allowed, window.wait(now, more, allowed))


def _problem(passed: _Passed) -> Problem:
    what = passed.limit.replace("_a_", " in a ").replace("_", " ")
    numbers = {"limit": passed.limit, "found": passed.found, "allowed": passed.allowed}
    if math.isinf(passed.wait):
        return Problem(
            "never_fits",
            "Too large",
            413,
            f"It takes {passed.found:,.0f} {what}, and {passed.allowed:,.0f} are allowed: send it "
            "in parts, or ask who runs the server for more.",
            **numbers,
        )
    # Rounded up, and a little more: the time has few digits behind the point.
    wait = math.ceil((passed.wait + 0.01) * 10) / 10 if passed.wait else 0.0
    when = f"try again in {wait:,.1f} s" if wait else "wait until results have been deleted"
    return Problem(
        "quota",
        "Too much now",
        429,
        f"With it there are {passed.found:,.0f} {what}, and {passed.allowed:,.0f} are allowed: "
        f"{when}.",
        retry_after=wait,
        **numbers,
    )
