"""Jobs that no recording makes, as bytes: a job that is right with other rows in it."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch

from insitu import InsituError, Job, LanguageModel, Model
from insitu.engine.job_wire import VERSION
from tests.conftest import tiny_gpt2

X = torch.arange(12.0).reshape(3, 4)
IDS = [[5, 6, 7, 8]]
MAGIC = b"insitu job"
HEAD = len(MAGIC) + 5
OPERATIONS, FILES, LINES, _TENSORS, _MODEL, BLOCKS = range(6)
PROCEDURE, OPTIONS, PROMPTS, ROWS, FIELDS, SAVES = range(6)


def framed(message: Any, tensors: bytes = b"", version: int = VERSION) -> bytes:
    """A message and its tensors in the frame of a job."""
    encoded = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    body = struct.pack("<Q", len(encoded)) + encoded + tensors
    return MAGIC + struct.pack("<BI", version, zlib.crc32(body)) + body


def opened(data: bytes) -> tuple[list[Any], bytes]:
    """The message of a job and its tensors."""
    end = HEAD + 8 + struct.unpack_from("<Q", data, HEAD)[0]
    return msgspec.msgpack.decode(data[HEAD + 8 : end]), data[end:]


def row(operation: int, *args: Any, **kwargs: Any) -> list[Any]:
    """A node: the number of its operation, its line and its arguments."""
    return [operation, 0, list(args), kwargs]


def ref(index: int) -> list[Any]:
    """The value of an earlier node."""
    return ["ref", index]


def small() -> Model:
    """A plain model that takes X."""
    torch.manual_seed(0)
    return Model(
        torch.nn.Sequential(
            torch.nn.Identity(), torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)
        )
    )


READ = row(0, 0, "1", "output", 0, 0)
"""Reads what the small model's first layer returns."""


def gpt() -> LanguageModel:
    """A tiny language model."""
    return LanguageModel(tiny_gpt2())


def plain_job(model: Model, *prompts: Any, generate: int = 0) -> bytes:
    """A job in which nothing is done to some prompts."""
    options = {"generate": True, "max_new_tokens": generate} if generate else {}
    with model.scan(**options) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                pass
    return tracer.job.to_bytes()


def job_bytes(
    model: Model,
    operations: Sequence[str],
    rows: Sequence[Any],
    fields: Mapping[str, Any] | None = None,
    prompts: Sequence[Any] | None = None,
    generate: int = 0,
) -> bytes:
    """A job with rows of one's own. What is saved has the number of its place as its name."""
    given = prompts or [X if type(model) is Model else IDS]
    message, tensors = opened(plain_job(model, *given, generate=generate))
    message[OPERATIONS] = list(operations)
    if not message[LINES]:
        message[FILES], message[LINES] = ["a.py"], [[0, 1, "x"]]
    block = message[BLOCKS][0]
    block[ROWS], block[FIELDS] = list(rows), dict(fields or {})
    kinds = [operations[one[0]] for one in rows]
    saved = [at for at, kind in enumerate(kinds) if kind in ("save", "keep")]
    block[SAVES] = [[at, str(number)] for number, at in enumerate(saved)]
    return framed(message, tensors)


def served(model: Model, data: bytes, **options: Any) -> Any:
    """Reads a job and runs it, as a server would."""
    return model.run(Job.from_bytes(data), **options)


def took(function: Callable[[], Any]) -> tuple[InsituError | None, float, float]:
    """Calls a function, and returns its documented error, seconds of CPU and megabytes."""
    begun, base = time.process_time(), peak()
    error: InsituError | None = None
    try:
        function()
    except InsituError as raised:
        error = raised
    return error, time.process_time() - begun, peak() - base


def peak() -> float:
    """The most memory that this process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def quick(function: Callable[[], Any], seconds: float = 2, megabytes: float = 200) -> Any:
    """Checks that a call ends soon and takes little; returns its documented error, or None."""
    error, spent, grown = took(function)
    assert spent < seconds and grown < megabytes, f"{error}; {spent:.2f} s, +{grown:.0f} MB"
    return error
