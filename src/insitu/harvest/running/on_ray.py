"""A harvest on many machines: actors of Ray hold the model and write shards.

The driver reads the data, cuts the ranges, and commits the shards in their order. So the folder is
what one process would have written, and it goes on as any other. Nothing of Ray's own checkpoints
is relied on: an actor that dies is replaced, and its range is run again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from insitu.graph.errors import ExecutionError, MissingPackageError, OptionError
from insitu.graph.location import here
from insitu.harvest.data.ranges import Range, line_of
from insitu.harvest.folder.folder import HarvestFolder
from insitu.harvest.layout import TOKEN_IDS
from insitu.harvest.progress import Report
from insitu.harvest.running.batch import Taking
from insitu.harvest.running.ranges_run import run_range
from insitu.harvest.running.specifying import Order
from insitu.harvest.running.statistics import with_statistics
from insitu.harvest.specification import Specification
from insitu.models.language_model import LanguageModel
from insitu.tracing.edit_files import edits_from_bytes, edits_to_bytes

_AHEAD = 2  # ranges of each actor that are there: one is run, and one waits
_DEATHS = 3  # of actors with the same range, before it is taken to be the cause


class _Sent(NamedTuple):
    """What an actor is made from.

    Attributes:
        module: the model's module.
        edits: its edits.
        told: the specification.
        taking: the fields of `Taking`, without the model.
        folder: where shards are written.
        threads: how many threads a forward has: with others it would give other bits.
    """

    module: Any
    edits: bytes
    told: Specification
    taking: dict[str, Any]
    folder: str
    threads: int


class _Worker:
    """An actor: runs ranges and writes their shards.

    Args:
        sent: what it is made from.
    """

    def __init__(self, sent: _Sent) -> None:
        torch.set_num_threads(sent.threads)
        model: LanguageModel = LanguageModel(sent.module)
        for graph in edits_from_bytes(sent.edits, "edits", model.modules):
            model = model.edited(graph)
        self._told = sent.told
        self._taking = Taking(model=model, **sent.taking)
        self._folder = HarvestFolder(Path(sent.folder), [])

    def run(self, one: Range) -> tuple[Any, int, str]:
        """Runs a range; returns the file that was written, its rows, and the mark in its name."""
        tensors = run_range(one, self._told, self._taking)
        mark = f"{os.uname().nodename}{os.getpid()}".replace("-", "").replace(".", "")
        written = self._folder.write(one.shard, with_statistics(self._told, tensors), mark)
        return written, len(tensors[TOKEN_IDS]), mark


def run_on_ray(
    work: Iterator[Range], order: Order, folder: HarvestFolder, report: Report, on: str
) -> None:
    """Runs ranges on actors of Ray, and commits their shards.

    Args:
        work: the ranges.
        order: the harvest.
        folder: the folder, which all actors reach by the same path.
        report: is told how far it has come.
        on: "ray", or "ray:" and how many actors there are.

    Raises:
        MissingPackageError: if Ray is not installed.
        OptionError: if the model is run by a server.
        ExecutionError: if actors die again and again.
        InsituError: what went wrong in an actor.
    """
    # It would send statistics of its use to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise MissingPackageError(
            "`on='ray'` takes Ray, which is not installed: `pip install \"insitu[cluster]\"`.",
            here(),
        ) from None
    if order.taking.model.away is not None:
        raise OptionError("A model on a server is run there, and not on Ray.", here())
    begun = not ray.is_initialized()
    if begun:  # an address in RAY_ADDRESS is that of a cluster
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        _Pool(ray, order, folder, report, on).run(work)
    finally:
        if begun:
            ray.shutdown()


class _Pool:
    """The actors, and which range each of them has."""

    def __init__(
        self, ray: Any, order: Order, folder: HarvestFolder, report: Report, on: str
    ) -> None:
        self._ray, self._folder, self._report = ray, folder, report
        taking, told = order.taking, order.specification
        fields = ("sites", "dtypes", "reduce", "metric", "most_tokens", "apart")
        taken = {name: getattr(taking, name) for name in fields}
        edits, path = edits_to_bytes(taking.model.edits), str(folder.path.resolve())
        module = taking.model.module
        sent = _Sent(module, edits, told, taken, path, torch.get_num_threads())
        self._sent = ray.put(sent)
        on_gpu = told.device == "cuda"
        self._class = ray.remote(num_gpus=1 if on_gpu else 0, num_cpus=1)(_Worker)
        there = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)
        self._count = int(on.partition(":")[2] or max(1, int(there)))
        self._actors = [self._class.remote(self._sent) for _ in range(self._count)]
        self._running: dict[Any, tuple[Any, Range]] = {}
        self._done: dict[int, tuple[Range, Any]] = {}
        self._deaths: dict[int, int] = {}

    def run(self, work: Iterator[Range]) -> None:
        """Runs ranges until there are no more."""
        more = True
        while more or self._running:
            # What is done and cannot be committed yet is counted too: files do not pile up.
            while more and len(self._running) + len(self._done) < _AHEAD * self._count:
                one = next(work, None)
                more = one is not None
                if one is not None:
                    self._start(one)
            if self._running:
                self._take()

    def _start(self, one: Range) -> None:
        """Gives a range to the actor that has the fewest."""
        busy = [actor for actor, _ in self._running.values()]
        actor = min(self._actors, key=lambda each: sum(each is other for other in busy))
        self._running[actor.run.remote(one)] = actor, one

    def _take(self) -> None:
        """Waits for a range, and commits those whose turn it is."""
        from ray.exceptions import (  # pyright: ignore[reportMissingImports]
            RayActorError,
            RayTaskError,
        )

        (done,), _ = self._ray.wait([*self._running], num_returns=1)
        actor, one = self._running.pop(done)
        try:
            self._done[one.shard] = one, self._ray.get(done)
        except RayActorError as error:
            self._replace(actor, one, error)
            return
        except RayTaskError as error:
            raise getattr(error, "cause", error) from None
        self._report.ran(one.tokens)
        while (turn := self._turn()) is not None:
            own, (written, rows, mark) = self._done.pop(turn)
            self._folder.commit(line_of(own, written, rows), mark)
            self._report.wrote(written.bytes)

    def _turn(self) -> int | None:
        """A shard that can be committed: the next one, or one that was broken."""
        return next((one for one in sorted(self._done) if one <= len(self._folder.lines)), None)

    def _replace(self, actor: Any, one: Range, error: Exception) -> None:
        """Puts another actor in the place of one that has died, with its range."""
        deaths = self._deaths[one.shard] = self._deaths.get(one.shard, 0) + 1
        if deaths >= _DEATHS:
            raise ExecutionError(
                f"{deaths} actors of Ray died with shard {one.shard}: {error}. Shards that are "
                "written stay, and the same call goes on behind them.",
                here(),
            ) from error
        if actor in self._actors:  # the first of its ranges that is noticed
            self._actors[self._actors.index(actor)] = self._class.remote(self._sent)
        self._start(one)
