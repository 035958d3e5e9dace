"""What an engine does with a batch: jobs are joined, run, and what each gives is written.

A batch that fails as a whole is run again in halves, so that the job that is the reason fails
alone. What only fails in an invocation is in that job's results, with its line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
import torch._subclasses.schema_check_mode  # else torch opens it over some job
from msgspec import structs

from insitu.engine.events import Event
from insitu.engine.failures import is_out_of_memory
from insitu.engine.job import Job
from insitu.engine.job_cutting import cut, invocations_of, merge
from insitu.engine.job_joining import join, split, without_sharing
from insitu.engine.limits import Limits
from insitu.engine.results import Results
from insitu.engine.seams import Cancel
from insitu.graph.errors import CancelledError, InsituError, JobError
from insitu.graph.structure import tensors_of
from insitu.remote.problems import Problem, problem_of
from insitu.server.background import noted
from insitu.server.engines.known_weights import CHANGED
from insitu.server.engines.messages import Ended, EngineJob, Told
from insitu.server.engines.telling import Task, Telling, owners_of_parts, owners_of_piece
from insitu.server.storage.job_files import job_in

COPIES = 4
"""How many times the bytes of results are in memory while they are written: as values, as rows, and
twice as a file."""

_TOGETHER_SECONDS = 60.0
"""How long jobs run that share passes, before they are run in halves."""


class Runs(Protocol):
    """A model that runs jobs."""

    def run(
        self,
        job: Job,
        *,
        limits: Limits | None = None,
        raises: bool = True,
        events: Callable[[Event], object] | None = None,
        cancel: Cancel | None = None,
    ) -> Results:
        """Runs a job: `Model.run`."""
        ...


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs that are run together.

    Attributes:
        model: the model.
        results: the folder that results are written to.
        tell: takes what there is to say to the front.
        write: writes results under a digest: given the folder, the bytes and the digest.
        shares: whether prefixes of prompts are shared between tenants.
        budget: the bytes that a run may take, of jobs whose sizes depend on values.
        piece: how many invocations of a job run before others get their turn; 0 for all.
        between: gives others their turn.
        device: where tensors of jobs are put, even if the jobs name another one.
        seconds: how long a run of one job may take, or of a piece of it; None for no limit.
        tasks: the jobs that are in it now, by id. Another thread may give them up.
        cancel: ends the run that is going on.
        begun: when the first pass began, in seconds of a clock that only goes forward; None
            before that.
        progress: a number that grows with all that happens in the run.
        passes: how many passes have run.
    """

    model: Runs
    results: Path
    tell: Callable[[Told | Ended], None]
    write: Callable[[Path, bytes, str], None]
    shares: bool = False
    budget: int | None = None
    piece: int = 0
    between: Callable[[], None] = lambda: None
    device: torch.device | None = None
    seconds: float | None = None
    tasks: dict[str, Task] = field(default_factory=dict[str, Task])
    cancel: Cancel = field(default_factory=Cancel)
    begun: float | None = None
    progress: int = 0
    passes: int = 0

    def run(self, asked: Sequence[EngineJob], given_up: Collection[str] = ()) -> None:
        """Runs jobs, and tells of each what has become of it.

        Args:
            asked: the jobs.
            given_up: the ids of those that nobody wants any more. Another thread may add some
                until they are in `tasks`.
        """
        ready: list[Task] = []
        for one in asked:
            try:
                job = job_in(one.body, one.blobs, device=self.device)
                ready.append(Task(one, job))
            except Exception as error:  # of whatever kind: others run all the same
                status = 422 if isinstance(error, InsituError) else 500
                self._fails(one, problem_of(error, status))
        self.tasks = {task.asked.id: task for task in ready}
        for task in ready:
            task.cancelled = task.cancelled or task.asked.id in given_up
        self._run(ready)
        self.tasks = {}

    def give_up(self, id: str, late: bool = False) -> None:
        """Gives up a job. The run is ended if it was the last that anybody waits for.

        Args:
            id: the job.
            late: whether that is because it has run for too long.
        """
        task = self.tasks.get(id)
        if task is None:
            return
        task.cancelled, task.late = task.cancelled or not late, task.late or late
        if all(one.is_given_up for one in [*self.tasks.values()]):
            self.cancel.cancel()

    def look_at_clock(self, now: float) -> None:
        """Gives up jobs that have run for longer than they may.

        Args:
            now: the time, of the clock that `begun` is of.
        """
        begun = self.begun
        if begun is not None:
            for task in [*self.tasks.values()]:
                seconds = task.asked.seconds
                if seconds is not None and now - begun > seconds and not task.is_given_up:
                    self.give_up(task.asked.id, late=True)

    def _run(self, tasks: Sequence[Task]) -> None:
        """Runs jobs together, or in halves where that fails."""
        tasks = [task for task in tasks if not self._is_over(task)]
        if not tasks:
            return
        self.cancel = Cancel()
        if all(task.is_given_up for task in tasks):  # given up since
            self.cancel.cancel()
        problem: Problem | None = None
        try:
            found = self._together(tasks)
        except CancelledError:
            for task in tasks:
                self._is_over(task)
            return
        except Exception as error:  # a job's own, or one of ours: the front hears which
            problem = noted("running a batch", error)
            if is_out_of_memory(error):
                problem = _of_memory(problem)
            elif isinstance(error, JobError):  # it was for the model that was there before
                problem = structs.replace(CHANGED, detail=f"{CHANGED.detail} {problem.detail}")
        if problem is None:
            for task, results in zip(tasks, found, strict=True):
                if not self._is_over(task):
                    self._done(task, results)
            return
        if len(tasks) > 1:
            half = len(tasks) // 2
            self._run(tasks[:half])
            self._run(tasks[half:])
        else:
            self._fails(tasks[0].asked, problem)

    def _together(self, tasks: Sequence[Task]) -> list[Results]:
        """The results of jobs that are run as one."""
        for leaf in (leaf for task in tasks for leaf in task.job.leaves):
            leaf.grad = None  # what a run that failed may have added
        limits = self._limits(tasks)
        if len(tasks) == 1:
            return [self._alone(tasks[0], limits)]
        jobs = [task.job for task in tasks]
        if not self.shares and len({task.asked.tenant for task in tasks}) > 1:
            jobs = [without_sharing(job) for job in jobs]
        joined = join(jobs)
        names = {
            name: (task, own)
            for task, part in zip(tasks, joined.parts, strict=True)
            for name, own in part.names.items()
        }
        tell = Telling(self, owners_of_parts(tasks, joined.parts), names)
        results = self.model.run(
            joined, limits=limits, raises=False, events=tell, cancel=self.cancel
        )
        return split(joined, results)

    def _alone(self, task: Task, limits: Limits | None) -> Results:
        """The results of a job that shares no pass, in pieces if others are to get their turn."""
        pieces = cut(task.job, self.piece) if self.piece else [task.job]
        places = invocations_of(task.job, pieces)
        found: list[Results] = []
        for number, job in enumerate(pieces):
            if found:
                self.between()
            if task.is_given_up:
                raise CancelledError("The job was given up between its pieces.")
            owners = owners_of_piece(task, places[number])
            tell = Telling(self, owners, piece=(number, len(pieces)))
            found.append(
                self.model.run(job, limits=limits, raises=False, events=tell, cancel=self.cancel)
            )
        return found[0] if len(pieces) == 1 else merge(task.job, pieces, found)

    def _limits(self, tasks: Sequence[Task]) -> Limits | None:
        """What a run of jobs may take. Some of them have sizes that depend on values."""
        seconds = self.seconds
        if seconds is not None and len(tasks) > 1:  # planned to take less than one
            seconds = min(seconds, _TOGETHER_SECONDS)
        if not any(task.asked.limits for task in tasks):
            return None if seconds is None else Limits(seconds=seconds)
        of_all = [task.asked.limits for task in tasks]
        operations, nodes = (
            [one[name] for one in of_all if name in one] for name in ("operations", "nodes")
        )
        given = [one["peak_bytes"] for one in of_all if "peak_bytes" in one]
        peak = min(given, default=self.budget)
        return Limits(
            peak_bytes=None if peak is None else int(peak),
            operations=sum(operations) if len(operations) == len(tasks) else None,
            nodes=int(sum(nodes)) if len(nodes) == len(tasks) else None,
            seconds=seconds,
        )

    def _is_over(self, task: Task) -> bool:
        """Tells of a job that was given up, and returns whether it was."""
        if task.asked.id not in self.tasks:
            return True
        if not task.is_given_up:
            return False
        del self.tasks[task.asked.id]
        asked = task.asked
        if task.cancelled:
            self.tell(Ended(asked.id, asked.attempt, cancelled=True))
        else:
            what = f"The job has run for longer than the {asked.seconds:g} seconds that it has."
            self.tell(Ended(asked.id, asked.attempt, problem=Problem("late", "Late", 504, what)))
        return True

    def _done(self, task: Task, results: Results) -> None:
        """Writes the results of a job, and tells of them."""
        asked = task.asked
        results.gradients = [leaf.grad for leaf in task.job.leaves]
        try:
            self._check_size(results)
            data = results.to_bytes()
            digest = hashlib.sha256(data).hexdigest()
            self.write(self.results, data, digest)
        except (InsituError, OSError) as error:
            status = 422 if isinstance(error, InsituError) else 507
            self._fails(asked, problem_of(error, status))
            return
        except Exception as error:  # its neighbours have their results all the same
            problem = noted("writing results", error)
            self._fails(asked, _of_memory(problem) if is_out_of_memory(error) else problem)
            return
        self.tasks.pop(asked.id, None)
        self.tell(Ended(asked.id, asked.attempt, digest, len(data)))

    def _check_size(self, results: Results) -> None:
        """Raises if there is no memory to write results, whose size was not known before."""
        tensors = tensors_of(dict(results))
        size = sum(one.numel() * one.element_size() for one in tensors)  # a view may have none
        what = f"The results have {size:,} bytes, and to write them takes {COPIES} times as many"
        Limits(peak_bytes=self.budget).check("peak_bytes", COPIES * size, what)

    def _fails(self, asked: EngineJob, problem: Problem) -> None:
        self.tasks.pop(asked.id, None)
        self.tell(Ended(asked.id, asked.attempt, problem=problem))


def _of_memory(problem: Problem) -> Problem:
    return Problem("out_of_memory", "Out of memory", 507, problem.detail, line=problem.line)
