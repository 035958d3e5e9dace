"""What a run tells while it runs: plain records, for whoever listens (see `seams.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from insitu.engine.sinks import SaveKey


@dataclass(frozen=True, slots=True)
class PassStarted:
    """A pass of the model begins.

    Attributes:
        block: which block of the job or session it is of, from 0.
        number: its number among the passes of the run, from 0.
        passes: how many there are.
        invocations: the invocations that it computes something of.
        done: the part of the run's work that is done, from 0 to 1: by floating-point operations
            where they are known.
    """

    block: int
    number: int
    passes: int
    invocations: Sequence[int]
    done: float


@dataclass(frozen=True, slots=True)
class PassEnded:
    """A pass of the model has ended.

    Attributes:
        block: as of `PassStarted`, and so are the others.
        number: as of `PassStarted`.
        passes: as of `PassStarted`.
        invocations: as of `PassStarted`.
        done: as of `PassStarted`, with the work of this pass.
    """

    block: int
    number: int
    passes: int
    invocations: Sequence[int]
    done: float


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A step of a generation begins.

    Attributes:
        block: which block of the job or session it is of, from 0.
        invocations: the invocations that go on in it.
        step: which step: step 0 processes the prompt.
    """

    block: int
    invocations: Sequence[int]
    step: int


@dataclass(frozen=True, slots=True)
class TokensChosen:
    """A step of a generation has chosen tokens. Searches with beams and assistants do not tell.

    Attributes:
        block: which block of the job or session it is of, from 0.
        invocation: whose tokens they are.
        step: which step.
        ids: the token of each row. A row that has ended gets padding.
    """

    block: int
    invocation: int
    step: int
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ValueSaved:
    """A saved value is final.

    Attributes:
        key: which value it is.
        bytes: the size of its tensors.
    """

    key: SaveKey
    bytes: int


Event = PassStarted | PassEnded | StepStarted | TokensChosen | ValueSaved
Listener = Callable[[Event], object]
