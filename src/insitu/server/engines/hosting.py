"""A model of a server: its engine and its admission workers, and what the engine does next.

All of it is one thread's, that of the event loop. What a job is and has been is in the store, so
that nothing is lost with this process. An engine that ends is started again, and its jobs run
again, with fewer others each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from insitu.remote.problems import Problem
from insitu.remote.protocol import ModelStatus
from insitu.server.background import kept_up, note
from insitu.server.engines.admission import AdmissionSettings
from insitu.server.engines.admission_pool import Admission
from insitu.server.engines.engine import EngineSettings
from insitu.server.engines.held_jobs import LEASE_SECONDS, HeldJobs
from insitu.server.engines.known_weights import CHANGED, KnownWeights
from insitu.server.engines.messages import (
    UNKNOWN_SPEED,
    Alive,
    BatchEnded,
    Began,
    CancelJob,
    EngineJob,
    Failed,
    FromEngine,
    Happened,
    Ready,
    RunBatch,
)
from insitu.server.engines.processes import Child, engine_process
from insitu.server.engines.scheduler import Capacity, Scheduler
from insitu.server.engines.sent_batches import Pulse
from insitu.server.engines.waiting_jobs import KnownLengths, WaitingJobs
from insitu.server.job_limits import MOST_STRIKES, JobLimits, banned
from insitu.server.limits import TenantLimits
from insitu.server.metrics import Metrics
from insitu.server.pace import Pace
from insitu.server.records import JobRecord, Tenant
from insitu.server.settings import ServedModel, Settings
from insitu.server.skeleton_file import SkeletonFile
from insitu.server.storage.data_folder import StorageError
from insitu.server.storage.files import Files
from insitu.server.storage.store import Store

logger = logging.getLogger(__name__)

SILENT_SECONDS = 30.0
"""After how many seconds without a word from it an engine counts as hanging."""
_LOADING_SECONDS = 300.0
"""The same while it is started: what it imports may come from a slow disk."""
_LOOK_SECONDS = 1.0
_STOPPED_SECONDS = 5.0
"""This process was stopped, or had no processor, if it looks so late: it has not heard anything."""
_WALL = 3.0
_SHORT_LIFE = 5.0
_LONGEST_PAUSE = 30.0
_MOST_FAILURES = 3


@dataclass(slots=True, eq=False)
class Host:
    """A model of a server.

    Attributes:
        model: which.
        settings: what the server was told.
        store: what it remembers.
        files: where bytes are.
        scheduler: says what runs next.
        metrics: counts what happens.
        changed: called with the id of a job to which something has happened.
        state: "loading", "ready", or "failed".
        ready: what the engine has said of itself, None until then.
        problem: why there is no engine.
        pace: how the engine comes on, None until it is ready.
        held: what the engine has.
        waiting: the jobs that are queued.
        lengths: the lengths of prompts that jobs had lately.
        skeleton: what clients make the model from.
    """

    model: ServedModel
    settings: Settings
    store: Store
    files: Files
    scheduler: Scheduler
    metrics: Metrics
    changed: Callable[[str], None]
    state: Literal["loading", "ready", "failed"] = "loading"
    ready: Ready | None = None
    problem: Problem | None = None
    pace: Pace | None = None
    lengths: KnownLengths = field(default_factory=KnownLengths)
    waiting: WaitingJobs = field(init=False)
    held: HeldJobs = field(init=False)
    admission: Admission = field(init=False)
    skeleton: SkeletonFile = field(init=False)
    _weights: KnownWeights = field(init=False)
    _measured: Ready | None = None  # the last that an engine has said of itself
    _engine: Child[FromEngine] | None = None
    _name: str = ""
    _pulse: Pulse = field(default_factory=lambda: Pulse(time.monotonic()))
    _short_lives: int = 0
    _failures: int = 0
    _was_ready: bool = False
    _ready_at: float = 0.0
    _stopping: bool = False
    _hung: bool = False
    _waiting_until: float = 0.0
    _tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    def __post_init__(self) -> None:
        settings, model = self.settings, self.model
        self.waiting = WaitingJobs(self.store.waiting(model.id))
        self.held = HeldJobs(
            self.store,
            self.files,
            self.waiting,
            self.metrics,
            model.id,
            settings.stored_seconds,
            self.changed,
        )
        self.skeleton = SkeletonFile(self._path("skeleton"))
        self._weights = KnownWeights(self._path("weights"), self.waiting.in_order())
        asked = AdmissionSettings(
            model.id,
            model.place,
            dict(model.loading),
            settings.admission_seconds,
            settings.admission_bytes,
            str(self.skeleton.path),
        )
        # By the clock on the wall it may take longer: others have the processor too.
        most = _WALL * settings.admission_seconds
        self.admission = Admission(asked, settings.admission_workers, most)

    @property
    def limits(self) -> JobLimits:
        """What one job may take."""
        return JobLimits(self.settings.job_limits, self.settings.pass_seconds, self._measured)

    def _path(self, what: str) -> Path:
        return self.files.folder / f"{what}-{self.model.id.replace('/', '--')}"

    def seconds_to_wait(self) -> float:
        """Returns about how long a job waits that comes now."""
        return self.waiting.operations / (self.ready.speed if self.ready else UNKNOWN_SPEED)

    def status(self) -> ModelStatus:
        """Returns what a client is told of the model."""
        _, digest = self.skeleton.travels()
        kind, dtype = self.skeleton.described()
        dtype, weights = (self.ready.dtype, self.ready.weights) if self.ready else (dtype, "")
        told = digest, self.settings.weights_readable, self.limits.as_dict(), weights
        return ModelStatus(self.model.id, kind, dtype, self.state, *told)

    async def start(self) -> None:
        """Starts the processes of the model, and waits until jobs can be admitted.

        Raises:
            LoadError: if they cannot be.
        """
        self._tasks.append(kept_up(f"the engine of {self.model.id}", self._keep_an_engine))
        await self.admission.start()
        self._tasks.append(kept_up(f"the watch over {self.model.id}", self._watch))

    async def stop(self) -> None:
        """Ends the processes of the model. Jobs that run go back to the queue, as if not begun."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.held.take_back(self._name, counts=False)
        await self.admission.stop()

    def dispatch(self) -> None:
        """Gives the engine the next jobs, if it is free; fails them if there never will be one."""
        try:
            if self.state == "failed" and self.problem is not None:
                self.held.fail([*self.waiting.in_order()], self.problem)
            self._dispatch()
        except Exception as error:  # whoever has woken it is not to blame: it is tried again
            note(f"choosing what {self.model.id} runs", error)

    def _dispatch(self) -> None:
        while self.state == "ready" and not self._stopping and self._is_free() and self.waiting:
            if self._waits_for_company():
                return
            theirs = map(self.store.tenant, {job.tenant for job in self.waiting.in_order()})
            tenants = {tenant.id: tenant for tenant in theirs if tenant is not None}
            self._refuse_banned(tenants)
            given = self.settings.tenant_limits
            limits = {id: TenantLimits.of(given, one.limits) for id, one in tenants.items()}
            waiting = self.waiting.due(self.held.running(), limits)
            picked = self.scheduler.pick(waiting, tenants, self._capacity(), self.store.now())
            if not picked or not self._send(picked):
                return

    def _waits_for_company(self) -> bool:
        """Whether the engine waits a moment: what waits will not be alone."""
        if self.held.batches or self.pace is None:
            return False
        now = time.monotonic()
        joins, waiting = self.settings.joins, self.waiting.in_order()
        left = self.pace.seconds_to_wait(now, waiting, joins)
        if left > 0 and self._waiting_until < now + left:
            self._waiting_until = now + left
            asyncio.get_running_loop().call_later(left, self.dispatch)
        return left > 0

    def _refuse_banned(self, tenants: Mapping[str, Tenant]) -> None:
        """Fails what waits of tenants whose jobs have ended the engine too often."""
        for tenant in tenants.values():
            if tenant.strikes >= MOST_STRIKES:
                theirs = [job for job in self.waiting.in_order() if job.tenant == tenant.id]
                self.held.fail(theirs, banned(tenant.name, tenant.strikes))

    def take(self, job: JobRecord) -> None:
        """Takes a job that was accepted.

        Args:
            job: the job.
        """
        self.waiting.add(job)
        if self.pace is not None:
            self.pace.company.came(time.monotonic())
        self.dispatch()

    def give_up(self, job: JobRecord) -> None:
        """Takes that nobody wants the results of a job any more.

        Args:
            job: the job.
        """
        self.waiting.remove([job.id])
        if self._engine is not None and job.state != "queued":
            self._engine.post(CancelJob(job.id))

    def _is_free(self) -> bool:
        running = [*self.held.batches.values()]
        return not running or (len(running) == 1 and running[0].in_pieces)

    def _capacity(self) -> Capacity:
        assert self.pace is not None
        return self.pace.capacity(self.settings.joins, only_short=bool(self.held.batches))

    def _send(self, picked: list[JobRecord]) -> bool:
        """Leases jobs and sends them to the engine; returns whether there were any."""
        piece = 0 if self.held.batches or self.pace is None else self.pace.piece(picked)
        number, leased = self.held.lease(picked, self._name, piece > 0)
        if not leased:
            return picked[0] not in self.waiting  # else the disk is full
        for job in leased:
            self.scheduler.charge(job.tenant, job.price.operations)
        self._pulse.moved = time.monotonic()
        # An engine that is gone is noticed where it is listened to: its jobs come back from there.
        return self._engine is not None and self._engine.post(
            RunBatch(number, [self._asked(job) for job in leased], piece)
        )

    def _asked(self, job: JobRecord) -> EngineJob:
        blobs = {one: str(self.files.blob_path(one)) for one in job.price.blobs}
        body, limits = str(self.files.body_path(job.body)), self.limits.of_run(job)
        return EngineJob(job.id, job.attempt, job.tenant, body, blobs, limits, job.seconds)

    async def _keep_an_engine(self) -> None:
        """Starts an engine, and another one when it ends."""
        while True:
            await self._live()
            if self.state == "failed":  # the model cannot be loaded: that stays so
                return
            self.metrics.engine_died(self.model.id)
            logger.warning("the engine of %s has ended, and is started again", self.model.id)
            if self._short_lives:
                await asyncio.sleep(min(0.1 * 2**self._short_lives, _LONGEST_PAUSE))

    async def _live(self) -> None:
        """Starts an engine, and listens to it until it ends."""
        self._name, self._hung = secrets.token_hex(8), False
        self.state, self.ready = "loading", None
        self._pulse = Pulse(time.monotonic())
        self._short_lives += 1
        self._engine = engine = engine_process(
            EngineSettings(
                self.model.place,
                dict(self.model.loading),
                str(self.files.results),
                self.settings.durable,
                self.settings.shares_between_tenants,
                seconds=self.limits.as_dict().get("seconds"),
            )
        )
        try:
            await engine.open()
            while (message := await engine.receive()) is not None:
                self._take(message)
        except Exception as error:  # it is ended, and what it had is run again
            note(f"what the engine of {self.model.id} says", error)
        finally:
            self._engine = None
            if self.state == "ready":
                self.state = "loading"
            await engine.close()
        for job in self.held.left():  # charged again when it is sent again
            self.scheduler.refund(job.tenant, job.price.operations)
        self.held.take_back(self._name, hung=self._hung)

    def _take(self, message: FromEngine) -> None:
        """Takes what the engine says."""
        now, held = time.monotonic(), self.held
        self._pulse.heard = now
        match message:
            case Ready():
                self._take_weights(message.weights)
                self._was_ready, self._ready_at = True, now
                self.state, self.ready, self.problem = "ready", message, None
                self._measured, self.pace = message, Pace(message)
                self._refuse_unfit()
            case Failed(problem):
                self.problem, self._failures = problem, self._failures + 1
                # Else it is tried again: the engine of a server that has just died, or another
                # program, may have the memory.
                if not self._was_ready and self._failures == _MOST_FAILURES:
                    self.state = "failed"
            case Alive(progress, _, memory):
                self._pulse.told(progress, now)
                with contextlib.suppress(StorageError):
                    self.store.renew(self._name, LEASE_SECONDS)
                self.metrics.memory(self.model.id, memory)
                if self.ready is not None and now - self._ready_at > _SHORT_LIFE:
                    self._short_lives = 0
            case Began(number):
                held.began(number)
            case Happened(found):
                held.happened(found)
            case BatchEnded(number, seconds, passes):
                batch = held.batch_ended(number, seconds, passes)
                if self.pace is not None and not batch.in_pieces:
                    self.pace.ended(now, seconds, batch.all)
                more = self.limits.unplanned(batch.all, seconds)
                self.scheduler.charge(batch.all[0].tenant, more)
        if isinstance(message, Began | Happened):
            self._pulse.moved = now
        if isinstance(message, Ready | BatchEnded | Began):
            self.dispatch()

    def _take_weights(self, weights: str) -> None:
        """Fails the jobs that were accepted when the model had other weights."""
        outdated = self._weights.outdated(weights, self.waiting.in_order())
        self.held.fail(outdated, CHANGED)
        self.held.unwritten.write(lambda: self._weights.note(weights))

    def _refuse_unfit(self) -> None:
        """Fails the jobs that were accepted when nobody knew what the engine can take."""
        for job in [*self.waiting.in_order()]:
            problem = self.limits.refusal(job)
            if problem is not None:
                self.held.fail([job], problem)

    async def _watch(self) -> None:
        """Ends an engine that hangs, and writes what there was no room for."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = time.monotonic()
            if now - last > _STOPPED_SECONDS:
                self._pulse.skip(now - last)
            last = now
            if self._engine is not None and self._hangs(now):
                logger.warning("the engine of %s does not come on, and is ended", self.model.id)
                self._hung = True
                self._engine.kill()
            self.held.unwritten.again()
            self.held.take_overdue(self._name)
            self.dispatch()

    def _hangs(self, now: float) -> bool:
        if self.ready is None:
            return self._pulse.hangs(now, _LOADING_SECONDS)
        most = self.settings.pass_seconds if self.held.batches else math.inf
        return self._pulse.hangs(now, SILENT_SECONDS, most)
