"""The load that servers are put under: requests of several kinds, users who send them, and checks.

A client is a process of its own: its load is not the server's. `listen` is the whole of it but for
how a request is written and sent, which is `serving_insitu.py`'s and `serving_nnsight.py`'s. Every
answer is compared with what PyTorch's hooks give here. It imports nothing of Insitu.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from plain import logits, on_input, on_output
from subjects import HEADS, LENGTH, numbers, parts
from torch import nn

VOCABULARY, WIDTH = 50257, 768
SAVED = (3, 6, 9)  # the blocks that are saved
ABLATED, STEERED = 5, 6  # the block whose MLP is put to zero, and the one that is steered
HEAD, HEADLESS = 3, 4  # the head that is taken out, and its block
NORMED = (4, 8, 11)  # the blocks whose norms are saved after that
TOP = 5
KINDS = ("saves", "ablation", "steering", "heads")
_BATCH = 16  # how many answers are checked in one forward


@dataclass(frozen=True, slots=True)
class Request:
    """What a user asks: a kind of experiment on a prompt of its own."""

    number: int
    vocabulary: int = VOCABULARY
    width: int = WIDTH

    @property
    def kind(self) -> str:
        return KINDS[self.number % len(KINDS)]

    @property
    def ids(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.number)
        return torch.randint(0, self.vocabulary, (1, LENGTH), generator=generator)

    @property
    def vector(self) -> torch.Tensor:
        """What steering adds at every position, `(width,)`."""
        return numbers(self.width, seed=self.number)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how many bytes went up and down for it, without heads."""

    values: Sequence[torch.Tensor]
    up: int
    down: int


class Client(Protocol):
    """How requests are written and sent to one kind of server."""

    def prepare(self, request: Request) -> Any:
        """Writes a request, which takes no time that is measured."""
        ...

    def send(self, user: int, prepared: Any) -> Answer:
        """Sends it as one of the users, and waits for the answer."""
        ...

    def sweep(self, user: int) -> float:
        """Runs a sweep of 193 invocations; returns the seconds of its longest pass."""
        ...


@dataclass(slots=True)
class Window:
    """What users have seen in a closed loop."""

    latencies: list[float] = field(default_factory=list)
    served: dict[int, int] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)
    answers: list[tuple[Request, Answer]] = field(default_factory=list)
    ran_out: float = 0.0


def expected(module: nn.Module, requests: Sequence[Request]) -> list[list[torch.Tensor]]:
    """Returns what requests of one kind give, with hooks: tensors with a row for each."""
    where = parts(module, "gpt2")
    ids = torch.cat([request.ids for request in requests])
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> None:
        kept.append(value[:, -1].clone())

    def norms(value: torch.Tensor) -> None:
        kept.append(value.norm(dim=-1))

    def headless(value: torch.Tensor) -> None:
        width = value.shape[-1] // HEADS
        value[..., HEAD * width : (HEAD + 1) * width] = 0

    with ExitStack() as hooks:
        match requests[0].kind:
            case "saves":
                for block in SAVED:
                    hooks.enter_context(on_output(where.blocks[block], keep))
            case "ablation":
                hooks.enter_context(on_output(where.blocks[ABLATED].mlp, torch.zeros_like))
            case "steering":
                added = torch.stack([request.vector for request in requests])[:, None]
                hooks.enter_context(on_output(where.blocks[STEERED], lambda value: value + added))
            case _:
                hooks.enter_context(on_input(where.projections[HEADLESS], headless))
                for block in NORMED:
                    hooks.enter_context(on_output(where.blocks[block], norms))
        last = logits(module, ids)[:, -1]
    match requests[0].kind:
        case "saves":
            kept.append(last)
        case "ablation" | "steering":
            kept.append(last.topk(TOP).values)
    return [[value[row] for value in kept] for row in range(len(requests))]


def check(module: nn.Module, answers: Sequence[tuple[Request, Answer]]) -> None:
    """Raises unless all answers are what hooks give."""
    for kind in KINDS:
        alike = [pair for pair in answers if pair[0].kind == kind]
        for start in range(0, len(alike), _BATCH):
            batch = alike[start : start + _BATCH]
            for (request, answer), values in zip(
                batch, expected(module, [request for request, _ in batch]), strict=True
            ):
                for found, value in zip(answer.values, values, strict=True):
                    torch.testing.assert_close(
                        found.reshape(value.shape), value, rtol=1e-3, atol=1e-4,
                        msg=lambda text, request=request: f"{request}: {text}",
                    )  # fmt: skip


def closed_loop(client: Client, users: int, requests: Sequence[Request]) -> Window:
    """Lets users send requests, each the next when it has the answer to its last."""
    prepared = [(request, client.prepare(request)) for request in requests]
    window, lock, pending = Window(), threading.Lock(), iter(prepared)
    failures: list[BaseException] = []
    start = time.perf_counter()

    def user(number: int) -> None:
        served = 0
        try:
            while not failures:
                with lock:
                    pair = next(pending, None)
                begun = time.perf_counter()
                if pair is None:
                    window.ran_out = window.ran_out or begun - start
                    break
                answer = client.send(number, pair[1])
                end = time.perf_counter()
                served += 1
                window.latencies.append(end - begun)
                window.ends.append(end - start)
                window.answers.append((pair[0], answer))
        except BaseException as error:
            failures.append(error)
        window.served[number] = served

    threads = [threading.Thread(target=user, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return window


def loop(client: Client, module: nn.Module, asked: dict[str, Any]) -> dict[str, Any]:
    """A closed loop, measured until there are no more requests to send, and its answers checked."""
    users = asked["users"]
    requests = [Request(asked["first"] + number) for number in range(asked["count"])]
    used = _processor_seconds()
    window = closed_loop(client, users, requests)
    used = _processor_seconds() - used
    check(module, window.answers)
    answered = sum(end <= window.ran_out for end in window.ends)
    return {
        "rate": answered / window.ran_out,
        "latencies": window.latencies,
        "served": [window.served[user] for user in range(users)],
        "up": statistics.mean(answer.up for _, answer in window.answers),
        "down": statistics.mean(answer.down for _, answer in window.answers),
        "client": used / len(requests),
    }


def idle(client: Client, module: nn.Module, asked: dict[str, Any]) -> dict[str, Any]:
    """Small jobs on a server that does nothing else, each after the same forward with hooks."""
    # Of one kind, whose forward is whole.
    requests = [Request(len(KINDS) * (asked["first"] + at)) for at in range(asked["count"])]
    forwards, latencies = [], []
    for request in requests:
        prepared = client.prepare(request)
        begun = time.perf_counter()
        expected(module, [request])
        forwards.append(time.perf_counter() - begun)
        time.sleep(0.05)  # until the threads of the forward have gone to sleep
        begun = time.perf_counter()
        answer = client.send(0, prepared)
        latencies.append(time.perf_counter() - begun)
        check(module, [(request, answer)])
        time.sleep(0.05)
    return {"forwards": forwards, "latencies": latencies}


def beside(client: Client, module: nn.Module, asked: dict[str, Any]) -> dict[str, Any]:
    """Small jobs of one user while another runs sweeps, and the longest pass of a sweep alone."""
    passes = [client.sweep(1) for _ in range(asked["sweeps"])]
    sweeping = threading.Thread(target=lambda: [client.sweep(1) for _ in range(asked["sweeps"])])
    prepared = [
        (request, client.prepare(request))
        for request in (Request(len(KINDS) * (asked["first"] + at)) for at in range(500))
    ]
    latencies, answers = [], []
    sweeping.start()
    for request, job in prepared:
        begun = time.perf_counter()
        answers.append((request, client.send(0, job)))
        if not sweeping.is_alive():
            break
        latencies.append(time.perf_counter() - begun)
        time.sleep(0.1)
    sweeping.join()
    check(module, answers)
    return {"passes": passes, "latencies": latencies}


MEASURES = {"loop": loop, "idle": idle, "beside": beside}


def listen(client: Client, module: nn.Module) -> None:
    """Does what lines of JSON on the standard input ask for, and answers each with one."""
    torch.set_grad_enabled(False)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(MEASURES[asked["what"]](client, module, asked)), flush=True)


def timed(call: Callable[[], Any]) -> float:
    """Returns how many seconds something takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
