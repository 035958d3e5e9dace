"""What the jobs of a batch are told: each its own blocks, invocations and names, and once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from insitu import Job, LanguageModel, join
from insitu.engine.events import PassEnded, TokensChosen, ValueSaved
from insitu.engine.job_cutting import cut, invocations_of
from insitu.engine.sinks import SaveKey
from insitu.server.engines.messages import EngineJob
from insitu.server.engines.telling import Task, Telling, owners_of_parts, owners_of_piece
from tests.conftest import tiny_gpt2

pytestmark = pytest.mark.no_wire


@dataclass
class Counts:
    begun: float | None = None
    progress: int = 0
    passes: int = 0
    told: list[Any] = field(default_factory=list)

    def tell(self, one: Any) -> None:
        self.told.append((one.id, one.kind, dict(one.data)))


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(tiny_gpt2())


def task(name: str, job: Job) -> Task:
    return Task(EngineJob(name, 1, name, "", {}, {}), job)


def traced(model: LanguageModel, count: int) -> Job:
    with model.scan() as tracer:
        for number in range(count):
            with tracer.invoke(torch.tensor([[1, 2, number + 3]])):
                model.lm_head.output.save(f"logits.{number}")
    return tracer.job


def test_jobs_that_are_joined_hear_of_their_own(model: LanguageModel) -> None:
    jobs = [traced(model, 2), traced(model, 3)]
    joined = join(jobs)
    tasks = [task(name, job) for name, job in zip("ab", jobs, strict=True)]
    names = {
        name: (one, own)
        for one, part in zip(tasks, joined.parts, strict=True)
        for name, own in part.names.items()
    }
    counts = Counts()
    tell = Telling(counts, owners_of_parts(tasks, joined.parts), names)
    tell(PassEnded(0, 0, 2, (1, 2, 4), 0.5))
    (theirs,) = [name for name, (_, own) in names.items() if own == "logits.2"]
    tell(ValueSaved(SaveKey(theirs, 0, 4), 8))
    for _ in range(2):  # as where a run is made again
        tell(TokensChosen(0, 3, 1, (7,)))
    progress = {"done": 0.5, "number": 0, "passes": 2, "block": 0}
    assert counts.told == [
        ("a", "progress", progress),
        ("b", "progress", progress),
        ("b", "value", {"block": 0, "name": "logits.2", "bytes": 8, "step": None}),
        ("b", "token", {"block": 0, "invocation": 1, "step": 1, "ids": [7]}),
    ]
    assert (counts.progress, counts.passes) == (4, 1)


def test_a_piece_of_a_session_tells_of_the_blocks_of_the_whole(model: LanguageModel) -> None:
    with model.session() as session:
        for first in (1, 20):
            with model.trace() as tracer:
                for number in range(3):
                    with tracer.invoke(torch.tensor([[first, 2, number + 3]])):
                        model.lm_head.output.save(f"{first}/{number}")
    job = session.job
    pieces = cut(job, 2)
    places = invocations_of(job, pieces)
    assert len(pieces) > 1 and {at for piece in places for at, _ in piece} == {0, 1}
    heard = []
    for number, (piece, own) in enumerate(zip(pieces, places, strict=True)):
        counts = Counts()
        tell = Telling(counts, owners_of_piece(task("a", job), own), piece=(number, len(pieces)))
        for at, block in enumerate(piece.blocks):
            for invocation in range(len(block.prompts)):
                tell(TokensChosen(at, invocation, 0, (1,)))
        heard += [(data["block"], data["invocation"]) for _, _, data in counts.told]
    assert sorted(heard) == [(block, number) for block in (0, 1) for number in range(3)]
