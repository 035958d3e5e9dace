"""Starting a server and ending it: for the command line, and in a `with` block of Python."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from insitu.graph.errors import LoadError
from insitu.graph.location import here
from insitu.server.core import Server
from insitu.server.settings import ServedModel, Settings

logger = logging.getLogger(__name__)


def run(settings: Settings, ready: Callable[[str], None] = lambda url: None) -> None:
    """Runs a server until it is told to end by a signal.

    Args:
        settings: what it is told.
        ready: called with its URL once it takes jobs.

    Raises:
        InsituError: if it cannot be started, saying why.
    """

    async def until_told() -> None:
        ends = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ends.set)
        await _serve(settings, ready, ends)

    asyncio.run(until_told())


def serve(
    *models: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    **others: Any,
) -> Running:
    """Returns a server for a `with` block, or to be started: for tests and notebooks.

    It is on this machine only, and only this user's clients get in. On the command line it is
    `insitu serve`.

    Args:
        models: as of `Running`, and so are the others.
        data: as of `Running`.
        loading: as of `Running`.
        others: as of `Running`.

    Raises:
        MissingPackageError: if what a server takes is not installed.

    Example:
        `with insitu.serve("insitu/eiffel") as server:`, and in it
        `model = LanguageModel("insitu/eiffel", remote=server.url)`.
    """
    return Running(*models, data=data, loading=loading, **others)


class Running:
    """A server that runs in this process, in a thread: what `insitu.serve(...)` returns.

    The models are in processes of their own, as always. It ends with its `with` block, or when
    `stop` is called.

    Args:
        models: repo ids, folders, or names of bundled models.
        data: the folder in which it keeps everything; None for one that goes with it.
        loading: keyword arguments for `LanguageModel`, of all models.
        others: other fields of `Settings`.

    Attributes:
        url: where it is, once it was started.
    """

    def __init__(
        self,
        *models: str | os.PathLike[str],
        data: str | os.PathLike[str] | None = None,
        loading: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        from insitu.server.packages import check_packages

        check_packages()
        self._data = data
        served = [served_model(os.fspath(one), loading or {}) for one in models]
        self._settings = Settings(served, Path(data or "."), **others)
        self.url = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None
        self._made: str | None = None

    def start(self) -> Self:
        """Starts it, and waits until it takes jobs.

        Raises:
            InsituError: if it cannot be started, saying why.
        """
        if self._data is None:
            self._made = tempfile.mkdtemp(prefix="insitu-")
            self._settings = replace(self._settings, data=Path(self._made))
        there = threading.Event()

        def ready(url: str) -> None:
            self.url = url
            there.set()

        async def until_told() -> None:
            self._loop, self._ends = asyncio.get_running_loop(), asyncio.Event()
            await _serve(self._settings, ready, self._ends)

        def main() -> None:
            try:
                asyncio.run(until_told())
            except BaseException as error:
                self._raised = error
            finally:
                there.set()

        self._thread = threading.Thread(target=main, name="insitu-server", daemon=True)
        self._thread.start()
        there.wait()
        if not self.url:
            self._thread.join()
            self._clean()
            raise self._raised or LoadError("The server has ended while it was started.", here())
        return self

    def stop(self) -> None:
        """Ends it. What waits is run when a server is started on the same folder."""
        if self._loop is not None and self._ends is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(self._ends.set)
        if self._thread is not None:
            self._thread.join()
        self._clean()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _clean(self) -> None:
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)


def served_model(name: str, loading: Mapping[str, Any]) -> ServedModel:
    """Returns a model as a server has it.

    Args:
        name: a repo id, a folder, or the name of a bundled model.
        loading: keyword arguments for `LanguageModel`.
    """
    folder = Path(name)
    if folder.is_dir():
        folder = folder.resolve()
        return ServedModel(folder.name, str(folder), loading)
    return ServedModel(name, name, loading)


async def _serve(settings: Settings, ready: Callable[[str], None], ends: asyncio.Event) -> None:
    """Runs a server until an event is set."""
    from insitu.server.http.front import app_of
    from insitu.server.http.listening import serve

    server = Server(settings)
    try:
        await server.start()
        listening = asyncio.create_task(
            serve(app_of(server), settings, lambda url: ready(server.announce(url)))
        )
        told = asyncio.create_task(ends.wait())
        await asyncio.wait({listening, told}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
        told.cancel()
    finally:
        await server.stop()
