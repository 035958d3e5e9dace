"""The workers that look at jobs, as the front sees them: forked, asked, and ended if they hang."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import time

from insitu.graph.errors import LoadError
from insitu.remote.problems import Problem, ProblemError
from insitu.server.engines.admission import AdmissionSettings
from insitu.server.engines.frames import AsyncFrames, BrokenFrameError
from insitu.server.engines.messages import Admitted, Check, FromAdmission, Refused
from insitu.server.engines.processes import child_process, until_ended
from insitu.server.engines.turns import Turns

logger = logging.getLogger(__name__)

_START_SECONDS = 300.0
_FORK_SECONDS = 20.0
_ENDING_SECONDS = 5.0
"""How long it takes at most from the end of a process's socket to the process's own."""
_TRIES = 2

_TOO_COSTLY = Problem(
    "too_costly_to_check",
    "Too costly to check",
    422,
    "What the job would take could not be found out within the seconds and the memory that the "
    "server has for that: make it smaller.",
)
_NOBODY = Problem(
    "busy",
    "Nobody checks jobs",
    503,
    "The process that checks jobs has ended, and could not be started again.",
    retry_after=5.0,
)


class Admission:
    """Workers that look at jobs, and the template that they are forked from.

    Args:
        settings: what the template is started with.
        workers: how many jobs are looked at at once.
        seconds: after how many seconds of the clock on the wall a check is ended.
    """

    def __init__(self, settings: AdmissionSettings, workers: int, seconds: float) -> None:
        self._settings, self._seconds = settings, seconds
        self._turns = Turns[_Worker | None]([None] * workers)  # None: it is not forked yet
        self._workers: set[_Worker] = set()
        self._template: _Template | None = None
        self._forking = asyncio.Lock()

    @property
    def workers(self) -> list[int]:
        """The numbers of the processes of workers."""
        return [worker.pid for worker in self._workers]

    @property
    def template(self) -> int | None:
        """The number of the process that they are forked from, None if there is none now."""
        return None if self._template is None else self._template.pid

    async def start(self) -> None:
        """Starts the template, and waits until it is ready. One that is killed is started again.

        Raises:
            LoadError: if it ends before by itself, or is killed again.
        """
        for _ in range(_TRIES):
            self._template = template = _Template(self._settings)
            try:
                await asyncio.wait_for(template.is_ready(), _START_SECONDS)
                return
            except (OSError, TimeoutError):
                was_killed = await asyncio.to_thread(template.was_killed)
                await self._end_template()
            if not was_killed:
                break
            logger.warning("the process that workers are forked from was killed as it started")
        raise LoadError(
            f"{self._settings.id!r} cannot be loaded, not even without its weights: what the "
            "process that does that has said is above."
        )

    async def check(self, asked: Check) -> Admitted | Refused:
        """Returns what a job would take, or why it cannot be run.

        Args:
            asked: the job.

        Raises:
            ProblemError: 503 if nobody can look at it now.
        """
        worker = await self._turns.get(asked.tenant)
        begun = time.monotonic()
        try:
            if worker is not None and worker.frames.has_ended:  # while nobody asked it
                await self._forget(worker)
                worker = None
            for _ in range(_TRIES):  # the first worker may have been ended by somebody else
                worker = worker or await self._fork()
                answer = await asyncio.wait_for(worker.check(asked), self._seconds)
                if answer is not None:
                    return answer
                logger.warning("a worker that looked at a job has ended over it")
                await self._forget(worker)
                worker = None
        except TimeoutError:
            logger.warning("a worker looks at a job for too long, and is ended")
            worker = await self._killed(worker)
        except BaseException:  # nobody knows what it does now
            worker = await self._killed(worker)
            raise
        finally:
            self._turns.put(worker, asked.tenant, time.monotonic() - begun)
        return Refused(_TOO_COSTLY)

    async def stop(self) -> None:
        """Ends all of it."""
        for worker in [*self._workers]:
            await self._killed(worker)
        await self._end_template()

    async def _fork(self) -> _Worker:
        """A new worker; the template is started again if it has gone, or hangs."""
        async with self._forking:
            for _ in range(_TRIES):
                try:
                    if self._template is None:
                        await self.start()
                    assert self._template is not None
                    worker = await asyncio.wait_for(self._template.fork(), _FORK_SECONDS)
                    self._workers.add(worker)
                    return worker
                except (OSError, TimeoutError):  # a `LoadError` too
                    logger.warning("the process that workers are forked from is started again")
                    await self._end_template()
                except BaseException:  # its answer would be taken for that to the next question
                    await self._end_template()
                    raise
        raise ProblemError(_NOBODY)

    async def _killed(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            await self._forget(worker)

    async def _forget(self, worker: _Worker) -> None:
        self._workers.discard(worker)
        await worker.close()

    async def _end_template(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            await template.end()


class _Template:
    """The process that workers are forked from.

    Args:
        settings: what it is started with.

    Attributes:
        pid: its number.
    """

    def __init__(self, settings: AdmissionSettings) -> None:
        self._process, self._control = child_process("insitu.server.engines.admission", settings)
        self._control.setblocking(False)
        self.pid = self._process.pid

    async def is_ready(self) -> None:
        """Waits until it is ready.

        Raises:
            OSError: if it ends before.
        """
        await self._read(1)

    def was_killed(self) -> bool:
        """Returns whether a signal has ended it, and not an error of its own."""
        try:
            return self._process.wait(_ENDING_SECONDS) < 0
        except subprocess.TimeoutExpired:  # it hangs
            return False

    async def fork(self) -> _Worker:
        """Returns a new worker.

        Raises:
            OSError: if it is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            number = int.from_bytes(await self._read(4), "big")
            ours.setblocking(False)
            return _Worker(number, await AsyncFrames[FromAdmission].on(ours, FromAdmission))
        except BaseException:
            ours.close()
            raise

    async def end(self) -> None:
        """Ends it. Workers that it has forked go on until they are told otherwise."""
        self._control.close()
        self._process.kill()
        await until_ended(self._process)

    async def _read(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            more = await asyncio.get_running_loop().sock_recv(self._control, count - len(found))
            if not more:
                raise ConnectionResetError
            found += more
        return found


class _Worker:
    """A process that looks at one job after the other.

    Args:
        pid: its number.
        frames: the way to it and back.

    Attributes:
        pid: as given.
        frames: as given.
    """

    def __init__(self, pid: int, frames: AsyncFrames[FromAdmission]) -> None:
        self.pid, self.frames = pid, frames

    async def check(self, asked: Check) -> Admitted | Refused | None:
        """Returns what it says of a job; None if it has ended over it."""
        try:
            await self.frames.send(asked)
            return await self.frames.receive()
        except (ConnectionError, BrokenFrameError):
            return None

    def kill(self) -> None:
        """Ends it. One that has ended by itself is not killed: its number may be another's."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def close(self) -> None:
        """Closes the way to it. It ends then, if it does nothing."""
        await self.frames.close()
