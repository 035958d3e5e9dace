"""The processes that look at jobs before anything runs them: they have no weights.

A template imports what it takes and makes each model without its weights, with one thread only.
Workers are forked from it, each with limits that the operating system holds, and each looks at one
job after the other. One that takes too long or too much is killed, and the next is forked.
"""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import torch

from insitu.engine.fingerprint import Fingerprint
from insitu.engine.limits import Limits, rows_of
from insitu.engine.unread_jobs import absent_from
from insitu.graph.errors import InsituError, LimitError, OptionError
from insitu.graph.location import Location
from insitu.graph.node import SEPARATOR, ModuleRef, Site, WeightRef
from insitu.graph.operations import READ
from insitu.graph.structure import map_structure
from insitu.remote.problems import Problem, problem_of
from insitu.remote.protocol import SavedShape
from insitu.server.background import noted
from insitu.server.engines.batches import COPIES
from insitu.server.engines.frames import Frames
from insitu.server.engines.imports import import_what_runs_need
from insitu.server.engines.messages import Admitted, Check, Refused, ToAdmission
from insitu.server.served_options import check_options, times_counted
from insitu.server.storage.job_files import job_in

if TYPE_CHECKING:
    from insitu.engine.job import Job
    from insitu.engine.job_parts import JobBlock
    from insitu.models.language_model import LanguageModel
    from insitu.tracing.job_check import JobCheck

MOST_BLOBS = 512
"""How many tensors of a job may be sent apart: their names go to an engine with a batch."""

_OF_JOBS = ("peak_bytes", "operations", "nodes", "sites")
"""Limits that a smaller job keeps."""

_WITHOUT_WEIGHTS = ("softmax", "scaled_dot_product_attention")
"""Functions inside of forwards whose arguments are no weights."""


class AdmissionSettings(msgspec.Struct, frozen=True):
    """What a template is started with, as JSON among its arguments.

    Attributes:
        id: as of `ServedModel`.
        place: as of `ServedModel`.
        loading: as of `ServedModel`.
        seconds: how many seconds of a processor a check may take.
        bytes: how much memory it may take, beside what the template has.
        skeleton: the path that the model's skeleton is written to.
    """

    id: str
    place: str
    loading: dict[str, Any]
    seconds: float
    bytes: int
    skeleton: str


def check(model: LanguageModel, asked: Check) -> Admitted | Refused:
    """Returns what a job would take, or why it cannot be run. Nothing of it runs.

    Args:
        model: the model, without weights.
        asked: the job.
    """
    start = time.process_time()
    limits = Limits(**asked.limits)  # pyright: ignore[reportArgumentType]
    try:
        apart = absent_from(Path(asked.body).read_bytes())
        if len(apart) > MOST_BLOBS:
            return Refused(_too_many_blobs(len(apart)))
        absent = [one for one in apart if one not in asked.blobs]
        if absent:
            return Refused(_missing(absent))
        job = job_in(asked.body, asked.blobs, limits, torch.device("cpu"))
        if not asked.weights_readable:
            refuse_weights(job)
        count = sum(len(block.prompts) for block in job.blocks)
        check_options(job)
        whole = _of_prompts(limits, asked.each, count)
        found = model.check(job, limits=whole)
        times = times_counted(job)
        operations = _checked_operations(job, found, whole, times, asked.weight)
        peak = _checked_bytes(job, found, whole, times)
    except LimitError as error:
        return Refused(problem_of(error, 413 if error.limit in _OF_JOBS else 422))
    except Exception as error:
        return Refused(noted("looking at a job", error))
    results = [
        SavedShape(one.name, one.shape, one.dtype, one.bytes) for one in found.described(job.saves)
    ]
    return Admitted(
        found.passes,
        operations,
        peak,
        found.result_bytes,
        results,
        list(found.differences),
        count,
        sum(_positions(block) for block in job.blocks),
        joins_of(job) if found.is_bounded else "",  # others would be looked at with it
        found.is_bounded,
        sorted({length for block in job.blocks for length in _lengths(block)}),
        time.process_time() - start,
        sum(1 for block in job.blocks for _ in rows_of(block.graph)),
        found.graph_numbers,
    )


def _checked_operations(
    job: Job, found: JobCheck, limits: Limits, times: float, weight: float
) -> float:
    """Returns the operations of a job, if they are not too many as the engine counts them."""
    operations = found.model_flops.value * times + found.graph_flops.value
    line = found.heaviest
    if line is None or found.model_flops.value * times > weight * found.graph_flops.value:
        line = job.blocks[0].prompts[0].location
    weighed = operations + (weight - 1) * found.graph_numbers
    limits.check("operations", weighed, f"The job takes {weighed:.3g} operations", line)
    return operations


def _checked_bytes(job: Job, found: JobCheck, limits: Limits, times: float) -> float:
    """Returns how many bytes a job has in use at once, if they are not too many."""
    peak = max(0.0, found.peak_bytes.value - found.weight_bytes) * times
    line = job.blocks[0].prompts[0].location
    what = f"The job takes {peak:,.0f} bytes at once beside the model's weights"
    limits.check("peak_bytes", peak, what, line)
    sizes = {name: one.bytes or 0 for name, one in found.results.items()}
    whole = sum(sizes.values())
    most = max(sizes, key=lambda name: sizes[name], default="")
    places = [
        block.graph[index].location
        for block in job.blocks
        for index, name in block.saves.items()
        if name == most
    ]
    what = f"The job saves {whole:,} bytes, and to write them takes {COPIES} times as many"
    limits.check("peak_bytes", COPIES * whole, what, next(iter(places), None))
    return max(peak, COPIES * whole)


def _of_prompts(limits: Limits, each: float | None, count: int) -> Limits:
    """Limits of a job that holds so many prompts."""
    if each is None:
        return limits
    most = each * max(count, 1)
    return replace(
        limits, operations=most if limits.operations is None else min(most, limits.operations)
    )


def _missing(digests: Sequence[str]) -> Problem:
    what = f"The job takes {len(digests)} tensors that were not sent: PUT them first."
    return Problem("missing_blobs", "Missing blobs", 409, what, digests=tuple(digests))


def _too_many_blobs(found: int) -> Problem:
    what = f"The job takes {found:,} tensors beside its own bytes, and {MOST_BLOBS} are allowed."
    limit = {"limit": "blobs", "found": found, "allowed": MOST_BLOBS}
    return Problem("limit", "Too many tensors", 413, what, **limit)


def refuse_weights(job: Job) -> None:
    """Raises if a job reads weights, or calls modules as functions, which tells of weights.

    Args:
        job: the job.

    Raises:
        OptionError: naming the line.
    """
    for block in job.blocks:
        for row in rows_of(block.graph):
            found: list[str] = []

            def leaf(item: Any, found: list[str] = found) -> None:
                if isinstance(item, ModuleRef | WeightRef):
                    found.append(item.path)

            map_structure(leaf, (row[1], dict(row[2])))
            if row[0] is READ:
                path = Site(*cast("Any", row[1])).path
                _, inside, function = path.partition(SEPARATOR)
                if inside and function not in _WITHOUT_WEIGHTS:
                    found.append(path)
            if found:
                raise OptionError(
                    f"This server lets nobody read weights, and `{found[0]}` is called as a "
                    "function, or read inside of its forward, which tells of them.",
                    Location(*row[5]),
                )


def joins_of(job: Job) -> str:
    """Returns a text that jobs have in common which may be run as one; "" if it runs alone.

    Args:
        job: the job.
    """
    if job.parts:
        return ""
    model = job.model
    told: list[Any] = [_model_text(model.fingerprint), [*model.edits], model.name, model.revision]
    for block in job.blocks:
        options = dict(block.options)
        if block.procedure == "generate":
            if options.get("return_dict_in_generate") or not _is_number(options):
                return ""
            del options["max_new_tokens"]
        demanded = None if block.demanded is None else [*block.demanded.options.items()]
        casts = [(device, str(dtype)) for device, dtype in sorted(block.casts.items())]
        told.append([block.procedure, sorted(options.items()), demanded, casts, str(block.dtype)])
        told.append(block.graph.differentiates)
    try:
        return hashlib.sha256(msgspec.json.encode(told)).hexdigest()[:32]
    except TypeError:  # a tensor among the options
        return ""


def _is_number(options: dict[str, Any]) -> bool:
    steps = options.get("max_new_tokens")
    return isinstance(steps, int) and not isinstance(steps, bool)


def _model_text(fingerprint: Fingerprint) -> str:
    generation = None if fingerprint.generation is None else sorted(fingerprint.generation.items())
    same = fingerprint.kind, fingerprint.order, fingerprint.tokens
    return f"{same} {[*fingerprint.dtypes]} {generation}"


def _positions(block: JobBlock) -> int:
    """Rows by positions of the prompts of a block, with the tokens to come."""
    steps = block.options.get("max_new_tokens") if block.procedure == "generate" else 0
    found = 0
    for prompt in block.prompts:
        if prompt.ids is not None:
            rows, positions = prompt.ids.shape
            found += rows * (positions + (prompt.steps or steps or 0))
    return max(found, 1)


def _lengths(block: JobBlock) -> list[int]:
    return [prompt.ids.shape[1] for prompt in block.prompts if prompt.ids is not None]


def _work(end: socket.socket, model: LanguageModel, settings: AdmissionSettings) -> None:
    """What a worker does: it looks at jobs until nobody asks any more."""
    frames: Frames[ToAdmission] = Frames(end, ToAdmission)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + settings.bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        asked = frames.receive()
        if asked is None:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + settings.seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        frames.send(check(model, asked))


def main() -> None:
    """Runs a template on the socket whose number is its first argument.

    Each byte on it comes with a socket, on which a new worker answers. The template answers with
    the number of the worker's process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for workers
    warnings.simplefilter("ignore")  # of jobs: what these warn of may quote their prompts
    torch.set_num_threads(1)  # a process with threads cannot be forked
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = msgspec.json.decode(sys.argv[2], type=AdmissionSettings)
    from insitu.models.language_model import LanguageModel
    from insitu.remote.skeletons import skeleton_of, skeleton_to_bytes

    loading = dict(settings.loading)
    if isinstance(loading.get("dtype"), str) and loading["dtype"] != "auto":
        loading["dtype"] = getattr(torch, loading["dtype"])
    model = LanguageModel(settings.place, **loading)
    import_what_runs_need()
    _write_skeleton(settings.skeleton, skeleton_to_bytes(skeleton_of(model, settings.id)))
    _warm(model)
    control.sendall(b"r")
    while True:
        sent, ends, _, _ = socket.recv_fds(control, 1, 1)
        if not sent:
            return
        end = socket.socket(fileno=ends[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            with suppress(BrokenPipeError, ConnectionResetError):
                _work(end, model, settings)
            os._exit(0)
        end.close()
        control.sendall(pid.to_bytes(4, "big"))


def _write_skeleton(path: str, data: bytes) -> None:
    from insitu import disk

    disk.write(path, data)


def _warm(model: LanguageModel) -> None:
    """Lets the template find out what every check takes: workers have it from there."""
    ids = torch.zeros(1, 8, dtype=torch.int64)
    with suppress(InsituError):  # a model of a kind that takes more than token ids
        with model.scan(ids) as tracer:
            model.output.save()
        model.check(tracer.job)


if __name__ == "__main__":
    main()
