"""What a server keeps: tenants, keys, jobs, and what they have used. Plain records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from insitu.remote.problems import Problem
from insitu.remote.protocol import JobState, Priority


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who uses the server: a person or a group, with its share of it.

    Attributes:
        id: its id.
        name: what it is called.
        weight: its share, beside those of others.
        limits: what it may take, by the names of `TenantLimits`, where that is not the default.
        strikes: how many times a job of its own, alone, has ended an engine.
    """

    id: str
    name: str
    weight: float = 1.0
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    strikes: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """What a tenant shows to be let in. Only a digest of the secret is kept.

    Attributes:
        prefix: the beginning of the key, by which it is found and named.
        digest: the SHA-256 digest of the whole key, in hexadecimal digits.
        tenant: the id of its tenant.
        scopes: what it is good for: "jobs", "admin".
        expires: when it ends, in seconds since 1970; None for never.
        revoked: whether it was revoked.
    """

    prefix: str
    digest: str
    tenant: str
    scopes: frozenset[str]
    expires: float | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Price:
    """What a job was found to take when it was admitted.

    Attributes:
        passes: how many passes of the model.
        operations: floating-point operations.
        peak_bytes: the most memory at once, without weights.
        result_bytes: the size of what it gives; an upper bound where that is not known.
        invocations: how many prompts it has.
        positions: rows by positions of all its prompts, with the tokens to come.
        joins: what it may share passes with: jobs with the same text here. "" if it runs alone.
        is_bounded: whether no value of it can be larger than it was counted as.
        blobs: the digests of its tensors that are not among its bytes.
    """

    passes: int
    operations: float
    peak_bytes: float
    result_bytes: int
    invocations: int = 1
    positions: int = 1
    joins: str = ""
    is_bounded: bool = True
    blobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job as the server keeps it.

    Attributes:
        id: 32 hexadecimal digits, that nobody can guess.
        tenant: the id of its tenant.
        model: the id of its model.
        state: where it is.
        priority: its class.
        body: the SHA-256 digest of its bytes, under which they are kept.
        price: what it takes.
        sequence: its place in the order in which jobs were accepted.
        attempt: how many times it was begun.
        company: with how many others it may be run at most; it shrinks each time that an engine
            dies with it.
        seconds: how long it may run, from its first pass; None for no limit of its own.
        created: when it was accepted, in seconds since 1970.
        started: when it last began to run.
        ended: when it ended.
        expires: when it is deleted, with its results.
        engine: the engine that has it, "" if none.
        lease_until: when that engine has lost it, unless the lease is renewed.
        idempotency: the key that it was sent with, "" if none.
        result: the SHA-256 digest of its results, "" if there are none.
        result_bytes: their size.
        problem: why it failed.
        body_bytes: the size of its bytes.
    """

    id: str
    tenant: str
    model: str
    state: JobState
    priority: Priority
    body: str
    price: Price
    sequence: int = 0
    attempt: int = 0
    company: int = 1_000
    seconds: float | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    engine: str = ""
    lease_until: float | None = None
    idempotency: str = ""
    result: str = ""
    result_bytes: int = 0
    problem: Problem | None = None
    body_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """What somebody asks for beside the job itself.

    Attributes:
        model: the id of the model; "" if the server has one only.
        priority: the class of the job.
        seconds: how long it may run.
        idempotency: a key that only this job is sent with, "" if there is none.
        attended: whether the client waits for it, so that it is given up if the client vanishes.
    """

    model: str = ""
    priority: Priority = "interactive"
    seconds: float | None = None
    idempotency: str = ""
    attended: bool = False
