"""The process that has the weights of a model: it runs batches, one after the other.

The model is run by the main thread. A second one reads what the front sends, so that a job can be
given up while its batch runs, and a third tells every second that the process is alive. The front
ends a process whose batch does not come on.
"""

from __future__ import annotations

import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from msgspec import structs

from insitu.models.weights_digest import weights_digest
from insitu.server.background import noted
from insitu.server.engines.batches import Batch
from insitu.server.engines.frames import Frames
from insitu.server.engines.imports import import_what_runs_need
from insitu.server.engines.messages import (
    UNKNOWN_SPEED,
    Alive,
    BatchEnded,
    Began,
    CancelJob,
    Ended,
    Failed,
    Happened,
    Ready,
    RunBatch,
    ToEngine,
    Told,
)
from insitu.server.storage.files import put_result

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel

logger = logging.getLogger(__name__)

_WARM_UP_TOKENS = 64
_NUMBERS = 2**23
_MOMENT = 0.004
"""After how many seconds the front is told of what happens, if nothing else is told before."""
_SOON = 0.1
"""The same of a value that was saved: to tell of each takes the processor from the forward."""
_MOST_AT_ONCE = 1024
_MEMORY_SHARE = 0.5
"""The part of the memory that is free beside the weights that passes may take."""


class EngineSettings(msgspec.Struct, frozen=True):
    """What an engine is started with, as JSON among its arguments.

    Attributes:
        place: as of `ServedModel`.
        loading: as of `ServedModel`.
        results: the folder that results are written to.
        durable: whether they survive a power failure.
        shares: whether prefixes of prompts are shared between tenants.
        threads: how many threads torch uses; 0 for its own choice.
        seconds: how long a run of one job may take, or of a piece of it; None for no limit.
    """

    place: str
    loading: dict[str, Any]
    results: str
    durable: bool = False
    shares: bool = False
    threads: int = 0
    seconds: float | None = None


class Engine:
    """A model, and the front that tells what to run on it.

    Args:
        frames: the way to the front and back.
        settings: what it was started with.
    """

    def __init__(self, frames: Frames[ToEngine], settings: EngineSettings) -> None:
        self._frames, self._settings = frames, settings
        self._sending = threading.Lock()
        self._happened: list[Told | Ended] = []  # what the front was not told of yet
        self._happens, self._presses = threading.Event(), threading.Event()
        self._asked: queue.SimpleQueue[RunBatch] = queue.SimpleQueue()
        self._batches: list[tuple[int, Batch]] = []  # the inner ones between pieces of the outer
        self._progress = 0
        self._given_up: set[str] = set()  # jobs of batches that run or are to come

    def send(self, message: Any) -> None:
        """Tells the front something, and before it what has happened. Any thread may."""
        with self._sending:
            found, self._happened = self._happened, []
            for start in range(0, len(found), _MOST_AT_ONCE):
                self._frames.send(Happened(found[start : start + _MOST_AT_ONCE]))
            if message is not None:
                self._frames.send(message)

    def tell(self, happened: Told | Ended) -> None:
        """Tells the front what has happened, soon: with what else happens in the same moment."""
        with self._sending:
            self._happened.append(happened)
        if isinstance(happened, Ended) or happened.kind != "value":
            self._presses.set()
        self._happens.set()

    def _tell_what_happens(self) -> None:
        """Tells the front what has happened a moment ago."""
        while True:
            self._happens.wait()
            self._presses.wait(_SOON)
            time.sleep(_MOMENT)
            self._happens.clear()
            self._presses.clear()
            with suppress(OSError):
                self.send(None)

    def run(self) -> None:
        """Loads the model, and runs what comes until the front is gone."""
        threading.Thread(target=self._tell_that_it_lives, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._tell_what_happens, daemon=True).start()
        try:
            model, ready = _loaded(self._settings)
        except Exception as error:
            self.send(Failed(structs.replace(noted("loading the model", error), status=503)))
            return
        self.send(ready)
        while True:
            self._run(model, self._asked.get(), ready.budget)

    def _run(self, model: LanguageModel, asked: RunBatch, budget: int) -> None:
        def write(folder: Path, data: bytes, digest: str) -> None:
            put_result(folder, data, digest, durable=self._settings.durable)

        def between() -> None:
            with suppress(queue.Empty):
                while True:
                    self._run(model, self._asked.get_nowait(), budget)

        batch = Batch(
            model,
            Path(self._settings.results),
            self.tell,
            write,
            self._settings.shares,
            budget,
            asked.piece,
            between,
            next(model.module.parameters()).device,
            self._settings.seconds,
        )
        start = time.monotonic()
        self._batches.append((asked.number, batch))
        self.send(Began(asked.number))
        try:
            batch.run(asked.jobs, self._given_up)
        finally:
            self._progress += batch.progress
            self._batches.pop()
            known = {*self._given_up}
            if not self._batches and self._asked.empty():  # none of these is to come
                self._given_up -= known
        self.send(BatchEnded(asked.number, time.monotonic() - start, batch.passes))

    def _listen(self) -> None:
        """Reads what the front sends."""
        while True:
            message = self._frames.receive()
            match message:
                case RunBatch():
                    self._asked.put(message)
                case CancelJob(id):
                    self._given_up.add(id)  # first: a batch looks there once it has its tasks
                    for _, batch in [*self._batches]:
                        batch.give_up(id)
                case None:  # the front is gone: what runs has nobody to be told of
                    os._exit(0)

    def _tell_that_it_lives(self) -> None:
        """Tells the front every second how far it is."""
        while True:
            running = [*self._batches]
            for _, batch in running:
                batch.look_at_clock(time.monotonic())
            progress = self._progress + sum(batch.progress for _, batch in running)
            number = running[-1][0] if running else 0
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            with suppress(OSError):
                self.send(Alive(progress, number, memory))
            time.sleep(1)


def _loaded(settings: EngineSettings) -> tuple[LanguageModel, Ready]:
    """Loads the model, and measures what it can do."""
    from insitu.models.language_model import LanguageModel

    if settings.threads:
        torch.set_num_threads(settings.threads)
    loading = dict(settings.loading)
    if isinstance(loading.get("dtype"), str) and loading["dtype"] != "auto":
        loading["dtype"] = getattr(torch, loading["dtype"])
    import_what_runs_need()
    model = LanguageModel(settings.place, **loading)
    module = model.load()
    speed = _speed(model)
    dtype = str(next(module.parameters()).dtype).removeprefix("torch.")
    digest, lines = weights_digest(module), lines_speed(next(module.parameters()).device)
    return model, Ready(os.getpid(), free_bytes(module), speed, dtype, digest, lines)


def _speed(model: LanguageModel) -> float:
    """Runs some tokens through the model, and returns its floating-point operations a second."""
    context = model.traits.reader.limits.context or _WARM_UP_TOKENS
    ids = torch.zeros(1, max(min(_WARM_UP_TOKENS, context // 2), 1), dtype=torch.int64)
    flops = float(2 * sum(one.numel() for one in model.module.parameters()) * ids.numel())
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        try:
            with model.trace(ids):
                model.output.save()
        except Exception:  # whatever a model makes of such a prompt: it may take others
            return UNKNOWN_SPEED
        best = min(best, time.perf_counter() - start)
    return flops / best


def lines_speed(device: torch.device) -> float:
    """Returns how many numbers of some size a device reads and makes in a second.

    Args:
        device: the device.
    """
    numbers = torch.zeros(_NUMBERS, device=device)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        (numbers * 2)[-1].item()
        best = min(best, time.perf_counter() - start)
    return _NUMBERS / best


def free_bytes(module: torch.nn.Module) -> int:
    """Returns how many bytes passes of a model may take together.

    Args:
        module: the model, with its weights.
    """
    device = next(module.parameters()).device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _MEMORY_SHARE)
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(int(line.split()[1]) * 1024 * _MEMORY_SHARE)
    return 2 * 2**30


def main() -> None:
    """Runs an engine on the socket whose number is its first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front tells it when to end
    logging.basicConfig(level=logging.WARNING)
    warnings.simplefilter("ignore")  # of jobs: what these warn of may quote their prompts
    end = socket.socket(fileno=int(sys.argv[1]))
    settings = msgspec.json.decode(sys.argv[2], type=EngineSettings)
    with suppress(BrokenPipeError):
        Engine(Frames(end, ToEngine), settings).run()
    os._exit(0)  # no thread of a library keeps it


if __name__ == "__main__":
    main()
