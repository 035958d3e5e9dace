"""What one job may take, by what the operator says and by what the engine was measured to do.

What a tenant may take with all of its jobs is another matter: `limits.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from insitu.engine.limits import Limits
from insitu.remote.problems import Problem
from insitu.server.engines.messages import UNKNOWN_SPEED, Admitted, Ready
from insitu.server.records import JobRecord

DEFAULTS: Mapping[str, float] = {"nodes": 20_000, "sites": 20_000, "seconds": 300.0}
"""Limits that hold unless others are set: of how long others wait for Python, and for one job."""

MOST_STRIKES = 3
"""How many times jobs of a tenant may end an engine, before nothing of it is run any more."""

_NODE_SECONDS = 2e-5
"""About what a recorded operation takes, beside its arithmetic."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """What one job may take.

    Attributes:
        given: what the operator says, by the names of `Limits`; infinity is no limit.
        pass_seconds: after how long a pass without an end means that its engine hangs.
        measured: what the engine has said of itself, the last time that there was one.
    """

    given: Mapping[str, float]
    pass_seconds: float
    measured: Ready | None = None

    @property
    def speed(self) -> float:
        """Floating-point operations in a second."""
        return self.measured.speed if self.measured is not None else UNKNOWN_SPEED

    @property
    def weight(self) -> float:
        """For how many operations one counts that is one for each number read or made."""
        if self.measured is None:
            return 1.0
        return max(1.0, self.speed / self.measured.lines_speed)

    @property
    def each(self) -> float | None:
        """The operations that each prompt of a job may take; None if that is not known yet.

        What cannot be cut, a forward of one prompt or a line, has to end long before the engine
        counts as hanging.
        """
        return None if self.measured is None else self.speed * self.pass_seconds / 2

    def as_dict(self) -> dict[str, float]:
        """Returns the limits by name; those that do not hold are not among them."""
        found = {**DEFAULTS, **self.given}
        if self.measured is not None:
            found["peak_bytes"] = min(found.get("peak_bytes", math.inf), self.measured.budget)
        return {name: value for name, value in found.items() if not math.isinf(value)}

    def of_run(self, job: JobRecord) -> dict[str, float]:
        """Returns what a run has to look at: nothing where all was known before.

        Args:
            job: the job.
        """
        if job.price.is_bounded:
            return {}
        found = self.as_dict()
        if self.each is not None:
            most = self.each * max(job.price.invocations, 1)
            # What is not known before is of values that are looked up, moved and made.
            found["operations"] = min(found.get("operations", math.inf), most) / self.weight
        return found

    def unplanned(self, jobs: Sequence[JobRecord], seconds: float) -> float:
        """Returns what a job has taken beside its price. Not all of that was known before.

        Args:
            jobs: the jobs of its batch: it has none beside it.
            seconds: how long that took.
        """
        price = jobs[0].price
        if price.is_bounded or self.measured is None:
            return 0.0
        return max(0.0, seconds * self.speed - price.operations)

    def refusal(self, job: JobRecord) -> Problem | None:
        """Returns why a job can never be run, None if it can.

        It was accepted when there was no engine that could say so.

        Args:
            job: the job.
        """
        found = {"peak_bytes": job.price.peak_bytes, "operations": job.price.operations}
        allowed = {"peak_bytes": self.as_dict().get("peak_bytes", math.inf)}
        most = math.inf if self.each is None else self.each * max(job.price.invocations, 1)
        allowed["operations"] = most
        for limit, value in found.items():
            if value > allowed[limit]:
                what = limit.replace("_", " ")
                return Problem(
                    "limit",
                    "Too large",
                    413,
                    f"The job takes {value:,.0f} {what}, and {allowed[limit]:,.0f} are allowed: "
                    "send it in parts.",
                    limit=limit,
                    found=value,
                    allowed=allowed[limit],
                )
        return None

    def beside(self, answer: Admitted) -> float:
        """Returns what a job takes beside its floating-point operations, as such.

        That is the time of memory and of Python.

        Args:
            answer: what admission found about it.
        """
        seconds = answer.nodes * _NODE_SECONDS
        if not answer.is_bounded:  # its run begins with another check
            seconds += answer.seconds
        return (self.weight - 1) * answer.numbers + seconds * self.speed


def checked_limits(given: Mapping[str, float]) -> None:
    """Raises if limits of jobs are none.

    Args:
        given: the limits, by the names of `Limits`.

    Raises:
        OptionError: if one is no number that can be one.
        TypeError: if there is no such limit.
    """
    Limits(**given)  # pyright: ignore[reportArgumentType]


def banned(name: str, strikes: int) -> Problem:
    """Returns why nothing of a tenant is run any more.

    Args:
        name: what the tenant is called.
        strikes: how many times its jobs have ended an engine.
    """
    return Problem(
        "refused",
        "Refused",
        403,
        f"Jobs of {name!r} have ended the engine {strikes} times: nothing more of it is run until "
        "somebody has looked at that.",
    )
