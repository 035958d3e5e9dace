"""What the front, the admission workers and the engines say to each other, in frames of msgpack.

Each is a record with a tag of its own. Nothing large is among them: jobs, tensors and results are
files, which they name by path and digest. There is no pickle, and no code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from insitu.remote.problems import Problem
from insitu.remote.protocol import SavedShape

UNKNOWN_SPEED = 1e10
"""The `speed` that counts where an engine's own is not known."""


class _Message(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    pass


# To an admission worker, and back.


class Check(_Message, frozen=True):
    """Asks what a job would take.

    Attributes:
        body: the path of its bytes.
        blobs: the paths of tensors that are not among them, by digest.
        limits: what it may take, by the names of `Limits`.
        tenant: whose it is: part of what it may share passes with.
        weights_readable: whether it may read weights and call modules as functions.
        each: the floating-point operations that each of its prompts may take; None for no limit.
        weight: for how many of them one counts that is one for each number that is read or made.
    """

    body: str
    blobs: Mapping[str, str]
    limits: Mapping[str, float]
    tenant: str
    weights_readable: bool = True
    each: float | None = None
    weight: float = 1.0


class Admitted(_Message, frozen=True):
    """What a job would take: fields as of `Price` and `JobPlan`.

    Attributes:
        is_bounded: whether no value of it can be larger than it was counted as.
        lengths: the lengths of its prompts, each once.
        seconds: what the check has taken, in seconds of a processor.
        nodes: how many recorded operations it has.
        numbers: those of the operations that are one for each number that is read or made.
    """

    passes: int
    operations: float
    peak_bytes: float
    result_bytes: int | None
    results: Sequence[SavedShape]
    differences: Sequence[str]
    invocations: int
    positions: int
    joins: str
    is_bounded: bool
    lengths: Sequence[int] = ()
    seconds: float = 0.0
    nodes: int = 0
    numbers: float = 0.0


class Refused(_Message, frozen=True):
    """Why a job cannot be run."""

    problem: Problem


# To an engine.


class EngineJob(_Message, frozen=True):
    """One job of a batch.

    Attributes:
        id: its id.
        attempt: which attempt this is. What comes back for another attempt counts for nothing.
        tenant: whose it is.
        body: the path of its bytes.
        blobs: as of `Check`.
        limits: as of `Check`; none where it is known that the job keeps them.
        seconds: how long it may run, None for no limit of its own.
    """

    id: str
    attempt: int
    tenant: str
    body: str
    blobs: Mapping[str, str]
    limits: Mapping[str, float]
    seconds: float | None = None


class RunBatch(_Message, frozen=True):
    """Asks an engine to run jobs together.

    Attributes:
        number: its number.
        jobs: the jobs.
        piece: how many invocations may run before other batches get their turn, where a job can
            be cut; 0 if the batch runs at once.
    """

    number: int
    jobs: Sequence[EngineJob]
    piece: int = 0


class CancelJob(_Message, frozen=True):
    """Asks an engine to give up a job."""

    id: str


# From an engine.


class Ready(_Message, frozen=True):
    """The weights are there, and what a pass takes was measured.

    Attributes:
        pid: its process.
        budget: the bytes that passes may take together, beside the weights.
        speed: floating-point operations in a second, in a pass of some size.
        dtype: the dtype of most weights.
        weights: a digest of the weights, "" if it is not known.
        lines_speed: operations in a second that are one for each number that is read or made.
    """

    pid: int
    budget: int
    speed: float
    dtype: str
    weights: str = ""
    lines_speed: float = 1e9


class Failed(_Message, frozen=True):
    """The model cannot be loaded, and why."""

    problem: Problem


class Alive(_Message, frozen=True):
    """Told every second, by a thread of its own.

    Attributes:
        progress: a number that grows whenever a pass or a step begins or ends.
        batch: the number of the batch that runs, 0 if none.
        memory: the resident bytes of the process.
    """

    progress: int
    batch: int
    memory: int


class Began(_Message, frozen=True):
    """A batch begins to run."""

    number: int


class Told(_Message, frozen=True):
    """Something happened to a job: an event, without its number."""

    id: str
    attempt: int
    kind: Literal["progress", "token", "value"]
    data: Mapping[str, Any]


class Ended(_Message, frozen=True):
    """A job has ended: either its results are there or there is a problem.

    Attributes:
        id: the job.
        attempt: which attempt.
        digest: the digest of its results, "" if there are none. The file is there before this is
            told.
        bytes: their size.
        problem: what failed of all of it.
        cancelled: whether it was given up because somebody asked for that.
    """

    id: str
    attempt: int
    digest: str = ""
    bytes: int = 0
    problem: Problem | None = None
    cancelled: bool = False


class Happened(_Message, frozen=True):
    """What has happened in a moment, in its order: many small messages would take long."""

    all: Sequence[Told | Ended]


class BatchEnded(_Message, frozen=True):
    """A batch has ended, and each of its jobs was told of.

    Attributes:
        number: its number.
        seconds: how long it took.
        passes: how many passes of the model it took.
    """

    number: int
    seconds: float
    passes: int


ToAdmission = Check
FromAdmission = Admitted | Refused
ToEngine = RunBatch | CancelJob
FromEngine = Ready | Failed | Alive | Began | Happened | BatchEnded
