"""The processes of a server as its front sees them: how they are started, told and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from typing import Any, Generic, TypeVar

import msgspec

from insitu.server.engines.frames import AsyncFrames, BrokenFrameError
from insitu.server.engines.messages import FromEngine

T = TypeVar("T")

_POLL_SECONDS = 0.01


class Child(Generic[T]):
    """A process that tells things on a socket.

    Args:
        module: the Python module that it runs.
        settings: what it is started with.
        kind: what it tells.
    """

    def __init__(self, module: str, settings: msgspec.Struct, kind: Any) -> None:
        self.process, self.end = child_process(module, settings)
        self._kind = kind
        self._frames: AsyncFrames[T] | None = None

    async def open(self) -> None:
        """Begins to talk with the process."""
        self.end.setblocking(False)
        self._frames = await AsyncFrames.on(self.end, self._kind)

    def post(self, message: Any) -> bool:
        """Sends a record without waiting, and returns whether the process was there to take it."""
        try:
            assert self._frames is not None
            self._frames.post(message)
        except ConnectionError:
            return False
        return True

    async def receive(self) -> T | None:
        """Waits for the next record; None when the process is gone, or talks nonsense."""
        assert self._frames is not None
        try:
            return await self._frames.receive()
        except BrokenFrameError:
            return None

    def kill(self) -> None:
        """Ends the process at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def close(self) -> None:
        """Ends the process, and waits until it has."""
        self.kill()
        await until_ended(self.process)
        if self._frames is not None:
            await self._frames.close()
        self.end.close()


def engine_process(settings: msgspec.Struct) -> Child[FromEngine]:
    """Starts an engine.

    Args:
        settings: its `EngineSettings`.
    """
    return Child("insitu.server.engines.engine", settings, FromEngine)


async def until_ended(process: subprocess.Popen[bytes]) -> None:
    """Waits until a process has ended, in no other thread: there is none when Python itself ends.

    Args:
        process: the process, which was killed.
    """
    while process.poll() is None:
        await asyncio.sleep(_POLL_SECONDS)


def child_process(
    module: str, settings: msgspec.Struct
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Starts a process, and returns it with a socket on which it is reached.

    Args:
        module: the Python module that it runs. Its first argument is the number of the socket.
        settings: its second argument, as JSON.
    """
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            arguments = [str(theirs.fileno()), msgspec.json.encode(settings).decode()]
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # a signal for the front is not for it
            )
    except BaseException:
        ours.close()
        raise
    return process, ours


def _environment() -> dict[str, str]:
    """What a process of the server finds in its environment: no key of anybody."""
    hidden = ("INSITU_KEY", "INSITU_REMOTE")
    found = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**found, "TQDM_DISABLE": "1"}  # progress bars of processes that nobody looks at
