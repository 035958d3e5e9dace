"""What a server and its clients say to each other over HTTP, as plain records.

The records are JSON bodies. Jobs and results travel as bytes: those of `Job.to_bytes` and of
`Results.to_bytes`. Errors are in `problems.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from insitu.remote.problems import Problem

JOB_TYPE = "application/vnd.insitu.job"
"""The media type of the bytes of a job."""

RESULTS_TYPE = "application/vnd.insitu.results+safetensors"
"""The media type of the bytes of results."""

SKELETON_TYPE = "application/vnd.insitu.skeleton+msgpack"
"""The media type of the files from which a client makes a model without weights."""

PROBLEM_TYPE = "application/problem+json"
"""The media type of an error."""

PROTOCOL = 1
"""The version of this protocol. Clients send it as the header `Insitu-Protocol`."""

BLOB_NAME = "tensor"
"""What the tensor of a blob is called in its safetensors file."""

INLINE_BYTES = 256 * 2**10
"""Tensors of a job that are larger are sent apart, once, by their digest."""

Priority = Literal["interactive", "batch"]
"""What goes first. Somebody waits for an interactive job."""

JobState = Literal["queued", "leased", "running", "done", "failed", "cancelled", "expired"]
"""Where a job is. The last four are its ends; which may follow which is in `server/states.py`."""

ENDS: frozenset[JobState] = frozenset(("done", "failed", "cancelled", "expired"))
"""The states in which nothing more happens to a job, but that its results are deleted."""


class JobStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a server says of a job.

    Attributes:
        id: its id, 32 hexadecimal digits.
        state: where it is.
        model: the id of its model on the server.
        priority: its class.
        created: when it was accepted, in seconds since 1970.
        place: how many jobs are before it, while it is queued.
        attempt: how many times it was begun.
        done: the part of its work that is done, from 0 to 1.
        started: when it began to run, None if it has not.
        ended: when it ended, None if it has not.
        expires: when its results are deleted.
        result_bytes: the size of its results, once they are there.
        digest: the SHA-256 digest of its results, once they are there.
        problem: what failed of all of it; what a single invocation raises is in the results.
    """

    id: str
    state: JobState
    model: str
    priority: Priority = "interactive"
    created: float = 0.0
    place: int | None = None
    attempt: int = 0
    done: float = 0.0
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    result_bytes: int | None = None
    digest: str | None = None
    problem: Problem | None = None


class JobList(msgspec.Struct, frozen=True):
    """A page of jobs, the newest first.

    Attributes:
        jobs: the jobs.
        after: what to ask for the next page with, None if this is the last.
    """

    jobs: Sequence[JobStatus]
    after: str | None = None


class JobEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that happened to a job: the data of a server-sent event.

    Attributes:
        number: its number among the events of the job, from 1. It is the id of the event.
        kind: what happened: "state" (`state`, `attempt`), "progress" (`done`, `block`, `number`,
            `passes`), "token" (`block`, `invocation`, `step`, `ids`), or "value" (`block`, `name`,
            `bytes`, `step`). Of progress, `number` is the pass that has ended and `passes` how many
            there are, with those of jobs that share them. The last event of a job is the "state"
            that is its end.
        data: what there is to say of it.
    """

    number: int
    kind: Literal["state", "progress", "token", "value"]
    data: Mapping[str, Any]


class SavedShape(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a saved value of a job would be.

    Attributes:
        name: the name that it is saved by.
        shape: its sizes as they are shown, such as "(1, 768)"; "?" if not known.
        dtype: its dtype as it is shown, "?" if not known.
        bytes: its size, None if not known.
    """

    name: str
    shape: str
    dtype: str
    bytes: int | None = None


class JobPlan(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a job would take, and when it would run.

    Attributes:
        model: the id of its model on the server.
        passes: how many passes of the model it takes.
        operations: floating-point operations of the model and of what was recorded.
        peak_bytes: the most memory that it uses at once, without the weights.
        result_bytes: the size of all results, None if that of one is not known.
        results: each saved value.
        differences: how the server's model differs from the one that the job was made for.
        queued: how many jobs would be before it.
        wait: about how many seconds it would wait.
    """

    model: str
    passes: int
    operations: float
    peak_bytes: float
    result_bytes: int | None
    results: Sequence[SavedShape]
    differences: Sequence[str] = ()
    queued: int = 0
    wait: float = 0.0


class ModelStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """A model of a server.

    Attributes:
        id: what it is called there, such as "insitu/eiffel".
        kind: the name of its class.
        dtype: the dtype of most of its weights.
        state: "loading", "ready", or "failed".
        skeleton: the SHA-256 digest of its skeleton.
        weights_readable: whether jobs may read weights and call modules as functions.
        limits: what one job may take, by the names of `Limits`; those without a limit are not
            among them.
        weights: the digest of its weights, "" while they are not loaded.
    """

    id: str
    kind: str
    dtype: str
    state: Literal["loading", "ready", "failed"]
    skeleton: str
    weights_readable: bool = True
    limits: Mapping[str, float] = msgspec.field(default_factory=dict[str, float])
    weights: str = ""


class ModelList(msgspec.Struct, frozen=True):
    """The models of a server.

    Attributes:
        models: the models, as the server was given them.
        version: the version of Insitu that it runs.
        protocol: the version of the protocol that it speaks.
    """

    models: Sequence[ModelStatus]
    version: str
    protocol: int = PROTOCOL


class Skeleton(msgspec.Struct, frozen=True):
    """What a client makes a model without weights from; it travels as msgpack.

    Attributes:
        model: the id of the model on the server.
        files: the contents of its config's and its tokenizer's files, by name.
        dtype: the dtype of its weights.
        task: as of `LanguageModel`, "" for the class that the config names.
    """

    model: str
    files: Mapping[str, bytes]
    dtype: str
    task: str = ""


class Usage(msgspec.Struct, frozen=True):
    """What a tenant has used today, and what it may.

    Attributes:
        operations: floating-point operations of its jobs.
        seconds: seconds of an engine.
        received: bytes that were received from it.
        sent: bytes of its results.
        queued: how many of its jobs wait.
        stored: bytes of its jobs, results and blobs on the server.
        limits: what it may take, by name; see `server/limits.py`.
    """

    operations: float
    seconds: float
    received: int
    sent: int
    queued: int
    stored: int
    limits: Mapping[str, float] = msgspec.field(default_factory=dict[str, float])
