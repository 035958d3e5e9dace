"""A client of `insitu serve` that `serving.py` puts load on it with: see `serving_load.py`."""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from typing import Any

import httpx
import torch
from serving_load import (
    ABLATED,
    HEAD,
    HEADLESS,
    NORMED,
    SAVED,
    STEERED,
    TOP,
    Answer,
    Request,
    listen,
)
from subjects import HEADS, LAYERS, LENGTH, gpt2

from insitu import Job, LanguageModel
from insitu.remote.connection import Connection


class Counting(httpx.BaseTransport):
    """Counts the bytes of bodies on their way."""

    def __init__(self) -> None:
        self._inner = httpx.HTTPTransport()
        self.up = self.down = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._inner.handle_request(request)
        self.up += int(request.headers.get("content-length", 0))
        self.down += int(answer.headers.get("content-length", 0))
        return answer

    def close(self) -> None:
        self._inner.close()


def recorded(model: Any, request: Request) -> Job:
    """Returns a request as a job."""
    blocks = model.transformer.h
    with model.scan(request.ids) as tracer:
        match request.kind:
            case "saves":
                for number in SAVED:
                    blocks[number].output[0][:, -1].save(f"block {number}")
                model.lm_head.output[0, -1].save("logits")
            case "ablation":
                blocks[ABLATED].mlp.output[:] = 0
                model.lm_head.output[0, -1].topk(TOP).values.save("top")
            case "steering":
                blocks[STEERED].output[0] += request.vector
                model.lm_head.output[0, -1].topk(TOP).values.save("top")
            case _:
                width = model.config.n_embd // HEADS
                given = blocks[HEADLESS].attn.c_proj.input
                given[..., HEAD * width : (HEAD + 1) * width] = 0
                for number in NORMED:
                    blocks[number].output[0].norm(dim=-1).save(f"norms {number}")
    return tracer.job


def sweeping(model: Any) -> Job:
    """Returns a sweep over all layers and positions, 193 invocations, as a job."""
    blocks = model.transformer.h
    clean_ids, ids = Request(1).ids, Request(2).ids
    with model.scan() as tracer:
        with tracer.invoke(clean_ids):
            clean = [block.output[0] for block in blocks]
        for layer in range(LAYERS):
            for position in range(LENGTH):
                with tracer.invoke(ids):
                    blocks[layer].output[0][:, position] = clean[layer][:, position]
                    model.lm_head.output[0, -1].topk(TOP).values.save(f"{layer} {position}")
    return tracer.job


class InsituClient:
    """Users with a connection each.

    Args:
        url: where the server is.
        keys: a key for each user.
    """

    def __init__(self, url: str, keys: list[str]) -> None:
        self._counts = [Counting() for _ in keys]
        self._connections = [
            Connection(url, key, transport=count)
            for key, count in zip(keys, self._counts, strict=True)
        ]
        self._model = LanguageModel("served", remote=self._connections[0])
        self._sweep = sweeping(self._model)

    def prepare(self, request: Request) -> Job:
        return recorded(self._model, request)

    def send(self, user: int, prepared: Job) -> Answer:
        count = self._counts[user]
        up, down = count.up, count.down
        results = self._connections[user].run(prepared)
        values = [results[name] for name in prepared.saves]
        return Answer(values, count.up - up, count.down - down)

    def sweep(self, user: int) -> float:
        """Runs the sweep, and returns the longest time between two of its passes' ends."""
        ends: list[float] = []

        def note(event: Any) -> None:
            running = event.kind == "state" and event.data["state"] == "running"
            if event.kind == "progress" or running:
                ends.append(time.perf_counter())

        self._connections[user].run(self._sweep, note, priority="batch")
        return max(end - start for start, end in pairwise(ends))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    listen(InsituClient(asked["url"], asked["keys"]), gpt2())
