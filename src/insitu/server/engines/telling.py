"""What the jobs of a batch are told while it runs, each its own part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from insitu.engine.events import (
    Event,
    PassEnded,
    PassStarted,
    StepStarted,
    TokensChosen,
    ValueSaved,
)
from insitu.engine.job import Job
from insitu.engine.job_parts import JobPart
from insitu.server.engines.messages import Ended, EngineJob, Told


@dataclass(slots=True, eq=False)
class Task:
    """A job of a batch that has been read.

    Attributes:
        asked: what the front has said of it.
        job: the job.
        cancelled: whether somebody has asked to give it up.
        late: whether it has run for longer than it may.
        chosen: the tokens that were told, by block, invocation and step: a run that is made again
            tells of none of them twice.
    """

    asked: EngineJob
    job: Job
    cancelled: bool = False
    late: bool = False
    chosen: set[tuple[int, int, int]] = field(default_factory=set[tuple[int, int, int]])

    @property
    def is_given_up(self) -> bool:
        """Whether nobody wants its results any more."""
        return self.cancelled or self.late


class Counted(Protocol):
    """What runs, as far as it is counted: fields as of `Batch`."""

    tell: Callable[[Told | Ended], None]
    begun: float | None
    progress: int
    passes: int


Owners = Mapping[tuple[int, int], tuple[Task, int, int]]
"""Whose each invocation of a run is, by its block and number: the job, and these in it."""


class Telling:
    """Tells the jobs of a run what happens in it, each its own part.

    Args:
        batch: what runs.
        owners: whose its invocations are.
        names: whose each of its saved values is, and how it is called there; none if all of it is
            of one job.
        piece: which piece of that one it is, and of how many.
    """

    def __init__(
        self,
        batch: Counted,
        owners: Owners,
        names: Mapping[str, tuple[Task, str]] = MappingProxyType({}),
        piece: tuple[int, int] = (0, 1),
    ) -> None:
        self._batch, self._owners, self._names = batch, owners, names
        self._piece, self._pieces = piece
        self._first = next(iter(owners.values()))[0]
        self._blocks = {(at, id(task)): own for (at, _), (task, own, _) in owners.items()}

    def __call__(self, event: Event) -> None:
        """Takes an event of the run."""
        batch = self._batch
        batch.progress += 1
        match event:
            case PassStarted():
                if batch.begun is None:
                    batch.begun = time.monotonic()
            case PassEnded(block, number, passes, invocations, done):
                batch.passes += 1
                done = (self._piece + done) / self._pieces
                told = {"done": round(done, 4), "number": number, "passes": passes}
                owners = [self._owners[block, one][:2] for one in invocations]
                for task, own_block in {id(one[0]): one for one in owners}.values():
                    self._tell(task, "progress", {**told, "block": own_block})
            case TokensChosen(block, invocation, step, ids):
                task, own_block, number = self._owners[block, invocation]
                place = own_block, number, step
                if place in task.chosen:
                    return
                task.chosen.add(place)
                data = {"block": own_block, "invocation": number, "step": step, "ids": [*ids]}
                self._tell(task, "token", data)
            case ValueSaved(key, size):
                task, name = self._names.get(key.name, (self._first, key.name))
                own_block = self._blocks[key.block, id(task)]
                data = {"block": own_block, "name": name, "bytes": size, "step": key.step}
                self._tell(task, "value", data)
            case StepStarted():
                pass

    def _tell(self, task: Task, kind: Any, data: Mapping[str, Any]) -> None:
        if not task.is_given_up:
            self._batch.tell(Told(task.asked.id, task.asked.attempt, kind, data))


def owners_of_piece(task: Task, places: Sequence[tuple[int, Sequence[int]]]) -> Owners:
    """Returns whose the invocations of a piece are.

    Args:
        task: the job.
        places: the block of the job that each block of the piece is, and its invocations.
    """
    return {
        (at, one): (task, block, number)
        for at, (block, numbers) in enumerate(places)
        for one, number in enumerate(numbers)
    }


def owners_of_parts(tasks: Sequence[Task], parts: Sequence[JobPart]) -> Owners:
    """Returns whose the invocations of a joined job are.

    Args:
        tasks: the jobs.
        parts: what of the joined job is of each.
    """
    return {
        (share.block, share.first + number): (task, block, number)
        for task, part in zip(tasks, parts, strict=True)
        for block, share in enumerate(part.shares)
        for number in range(share.count)
    }
