"""The states of a job and what may follow what, as data.

A job is `queued` once it was accepted, `leased` once an engine was told to run it, `running` once
that has begun, and then one of the ends. An engine that dies gives back what it had.
"""

from __future__ import annotations

from insitu.remote.protocol import ENDS, JobState, JobStatus
from insitu.server.records import JobRecord

FOLLOWS: frozenset[tuple[JobState, JobState]] = frozenset(
    (
        ("queued", "leased"),
        ("queued", "failed"),  # what it needs is gone: its model, or a file
        ("queued", "cancelled"),
        ("queued", "expired"),
        ("leased", "queued"),  # the engine died, or gave it back
        ("leased", "running"),
        ("leased", "failed"),
        ("leased", "cancelled"),
        ("leased", "expired"),
        ("running", "queued"),
        ("running", "done"),
        ("running", "failed"),
        ("running", "cancelled"),
        ("running", "expired"),
    )
)
"""The pairs of a state and one that may follow it."""

MOST_ATTEMPTS = 3
"""How many times a job is begun at most."""


def may_follow(before: JobState, after: JobState) -> bool:
    """Returns whether a job may go from one state to another.

    Args:
        before: the state that it is in.
        after: the other.
    """
    return (before, after) in FOLLOWS


def has_ended(state: JobState) -> bool:
    """Returns whether nothing more happens to a job.

    Args:
        state: the state that it is in.
    """
    return state in ENDS


def status_of(job: JobRecord, before: int) -> JobStatus:
    """Returns what a client is told of a job.

    Args:
        job: the job.
        before: how many jobs are before it, while it is queued.
    """
    return JobStatus(
        job.id,
        job.state,
        job.model,
        job.priority,
        job.created,
        before if job.state == "queued" else None,
        job.attempt,
        1.0 if job.state == "done" else 0.0,
        job.started,
        job.ended,
        job.expires,
        job.result_bytes if job.result else None,
        job.result or None,
        job.problem,
    )
