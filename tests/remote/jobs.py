"""Jobs for tests of the client, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import torch

from insitu import Job, LanguageModel

IDS = [[5, 6, 7]]


def job_of(model: LanguageModel, vector: torch.Tensor | None = None) -> Job:
    with model.scan(IDS) as tracer:
        if vector is not None:
            (model.lm_head.output[0, -1, :1] * vector).save("scaled")
        model.lm_head.output[0, -1].save("logits")
    return tracer.job


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


ID = "1".zfill(32)
"""The id of the first job that the server takes."""

STREAM = {"Content-Type": "text/event-stream"}


def of_events(answer: Callable[[httpx.Request, int], httpx.Response | None]) -> Any:
    """A fault of requests for events, which is told how many there were before."""
    count = -1

    def fault(request: httpx.Request) -> httpx.Response | None:
        nonlocal count
        if not request.url.path.endswith("/events"):
            return None
        count += 1
        return answer(request, count)

    return fault
