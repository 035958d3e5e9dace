"""Jobs that were changed at random: read and run with documented errors only, and with little.

    python -m tests.attack.mutated_jobs 1000000 --runs 100000 --seed 1

Each is a job of every kind of line, with a few things in it changed: bytes, numbers, operations,
arguments, whole rows. A job that can be read is written and printed again, checked, and run under
limits on a model of its structure. Whatever goes wrong is an `InsituError`. No job takes a second,
memory does not grow from job to job, and the model is as it was.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgspec
import torch

from insitu import InsituError, Job, LimitError, Limits, Model, cond, fold
from insitu.display import graph_text
from insitu.graph.operations import BY_NAME
from tests.attack.jobs import BLOCKS, OPERATIONS, ROWS, X, framed, gpt, opened, small

LIMITS = Limits(peak_bytes=2**26, operations=1e8, nodes=2000, sites=200, seconds=1)
UNCHECKED = Limits(nodes=2000, sites=200, seconds=1)
"""With which a run does not begin with a check."""

SLOW = 1.0
"""Seconds of the processor that one job may take, where `pace` is 1."""

GROWTH = 64 * 2**20
"""Bytes by which the process may grow after the first tenth of the jobs, however many they are."""

_NAMES = sorted(BY_NAME)
_INTEGERS = (0, 1, 2, 3, -1, 7, 255, 10**6, 2**31, 2**40, 2**63 - 1, -(2**63))


def _plain(model: Model) -> bytes:
    """Operations of many kinds on one value."""
    with model.trace(X) as tracer:
        hidden = model[1].output
        hidden[:, 0] = 0
        size = hidden.size(0)
        parts = hidden.split(2, dim=-1)
        (hidden * 2 + parts[0].sum()).save("sum")
        hidden[hidden > 0].save("above")
        hidden.unsqueeze(0).expand(5, 3, 4).reshape(15, 4).save("wide")
        torch.cat([hidden, hidden.repeat(2, 1)]).softmax(-1).topk(2).save("most")
        cond(hidden.sum() > 0, lambda x: x, lambda x: -x, hidden).save("size")
        fold(lambda carry, row: carry + row * 2, hidden[0], hidden).save("total")
        hidden.argmax(-1).bincount(minlength=4).save("counts")
        (hidden.abs().sum().long().item() << 2).save("number")
        torch.nn.functional.one_hot(hidden.argmax(-1)).save("hot")
        hidden.new_zeros(2, size if isinstance(size, int) else 3).save("zeros")
        model[2](hidden).save("called")
        model[3].output = model[3].output * 1.5
        {"a": hidden, "b": [hidden, 1]}  # noqa: B018
        model.output.save("output")
    return tracer.job.to_bytes()


def _gradients(model: Model) -> bytes:
    with model.trace(X) as tracer:
        hidden = model[1].output
        (hidden * hidden).sum().backward()
        hidden.grad.save("grad")
        model[2].skip(hidden)
        model[3].output.save("after", keep_graph=False)
    return tracer.job.to_bytes()


def _session(model: Any) -> bytes:
    with model.session() as session:
        with model.scan() as tracer:
            for number in range(3):
                with tracer.invoke([[number, 6, 7][: number + 1]]):
                    hidden = model.transformer.h[1].output[0]
                    hidden[:, 0] = torch.zeros(16)
                    hidden.max(dim=-1).values.save(f"most.{number}", optional=True)
                    model.transformer.h[0].attn.output[0].norm().save(f"norm.{number}")
        with model.scan([[5, 6, 7]], generate=True, max_new_tokens=2, do_sample=False) as tracer:
            model.transformer.h[2].output[0][:, -1:] = hidden[:, -1:]
            with tracer.every_step():
                model.transformer.h[0].output[0].mean().save("means")
            model.lm_head.output.save("logits")
    return session.job.to_bytes()


@dataclass
class Sample:
    """A job that is changed: its model, its message and its tensors."""

    model: Model
    data: bytes

    def message(self) -> tuple[list[Any], bytes]:
        """A message of its own to change."""
        return opened(self.data)


@cache
def samples() -> list[Sample]:
    """The jobs that are changed."""
    plain, language = small(), gpt()
    return [
        Sample(plain, _plain(plain)),
        Sample(plain, _gradients(plain)),
        Sample(language, _session(language)),
    ]


def mutated(sample: Sample, dice: random.Random) -> bytes:
    """A job with something in it changed."""
    message, tensors = sample.message()
    if dice.random() < 0.15:  # any bytes of the message, which the checksum admits
        encoded = bytearray(msgspec.msgpack.encode(message))
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(encoded))
            encoded[at : at + dice.randint(0, 2)] = dice.randbytes(dice.randint(0, 2))
        return framed(bytes(encoded), tensors)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        change = dice.choice((_operation, _argument, _argument, _argument, _row, _anything))
        with suppress(LookupError, TypeError, AttributeError):  # an earlier one left no such place
            change(message, dice)
    return framed(message, tensors)


def _operation(message: list[Any], dice: random.Random) -> None:
    """Another operation, on what there is."""
    names = message[OPERATIONS]
    names[dice.randrange(len(names))] = dice.choice(_NAMES)


def _rows(message: list[Any], dice: random.Random) -> list[Any]:
    return dice.choice(message[BLOCKS])[ROWS]


def _argument(message: list[Any], dice: random.Random) -> None:
    """Another argument of a node."""
    rows = _rows(message, dice)
    if not rows:
        return
    args = dice.choice(rows)[2]
    if not args:
        return
    at = dice.randrange(len(args))
    args[at] = dice.choice(
        (
            lambda: dice.choice(_INTEGERS),
            lambda: ["ref", dice.randrange(len(rows))],
            lambda: ["list", [args[at]] * dice.choice((1, 2, 50))],
            lambda: ["tuple", [["ref", 0], args[at]]],
            lambda: ["slice", dice.choice(_INTEGERS), None, dice.choice((None, -1, 2))],
            lambda: ["int", dice.randbytes(dice.choice((9, 100, 512)))],
            lambda: dice.choice((None, True, 0.5, float("nan"), 1e300, "x" * 50, "%d", "cpu")),
            lambda: ["named", dice.choice(("torch.int64", "torch.float16", "torch.bool"))],
        )
    )()


def _row(message: list[Any], dice: random.Random) -> None:
    """A row more, twice, or less."""
    rows = _rows(message, dice)
    if not rows:
        return
    at = dice.randrange(len(rows))
    match dice.randrange(4):
        case 0:
            rows.insert(dice.randrange(len(rows)), rows[at])
        case 1:
            del rows[at]
        case 2:
            operation = dice.randrange(len(message[OPERATIONS]))
            rows.append([operation, 0, [["ref", at], dice.choice(_INTEGERS)], {}])
        case _:
            rows[at][3][dice.choice(("dim", "out", "size", "max_norm"))] = dice.choice(_INTEGERS)


def _anything(message: list[Any], dice: random.Random) -> None:
    """Something anywhere in a block, mostly another of its kind."""
    found: Any = message[BLOCKS]
    while True:
        key = dice.choice(list(found) if isinstance(found, dict) else range(len(found)))
        inner = found[key]
        if not (isinstance(inner, list | dict) and inner) or dice.random() < 0.05:
            break
        found = inner
    if type(inner) is int:
        found[key] = dice.choice([inner + 1, max(inner - 1, 0), dice.randrange(4), -1])
    elif isinstance(inner, list) and inner and dice.random() < 0.7:
        found[key] = dice.choice([inner[1:], inner[::-1], [*inner, inner[0]]])
    else:
        found[key] = dice.choice(
            [None, True, 0, 2, 0.5, "output", "cpu", ["ref", 0], ["tensor", 1], [], {}]
        )


@cache
def pace() -> float:
    """How many times as long this machine takes as one that counts to ten million in 0.1 s."""
    counted: list[float] = []
    for _ in range(3):
        begun = time.process_time()
        sum(range(10_000_000))
        counted.append(time.process_time() - begun)
    return max(1.0, min(counted) / 0.1)


@dataclass
class Outcome:
    """What became of many jobs.

    Attributes:
        counts: how many were made, read and run, and which errors there were.
        wrong: those that went wrong: the number, and what happened.
        slowest: the most seconds of the processor that one took, and its number.
        growth: by how many bytes the process grew, after the first tenth.
    """

    counts: Counter[str] = field(default_factory=Counter[str])
    wrong: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, -1)
    growth: int = 0


def tried(number: int, seed: int, runs: bool, outcome: Outcome) -> None:
    """Makes a job by its number, reads it and perhaps runs it."""
    dice = random.Random(f"{seed} {number}")
    sample = dice.choice(samples())
    data = mutated(sample, dice)
    begun = time.process_time()
    outcome.counts["made"] += 1
    try:
        for call in _calls(sample, data, runs, outcome):
            call()
    except InsituError as error:
        outcome.counts[type(error).__name__] += 1
        if len(str(error)) > 20_000:
            outcome.wrong.append((number, f"an error of {len(str(error))} characters"))
    except Exception:
        outcome.wrong.append((number, traceback.format_exc(limit=-6)))
    took = time.process_time() - begun
    outcome.slowest = max(outcome.slowest, (took, number))
    if took > SLOW * pace():
        outcome.wrong.append((number, f"{took:.2f} seconds"))


def _calls(
    sample: Sample, data: bytes, runs: bool, outcome: Outcome
) -> Iterator[Callable[[], Any]]:
    """What is done to a job, one after the other."""
    jobs: list[Job] = []
    yield lambda: jobs.append(Job.from_bytes(data, limits=LIMITS))
    job = jobs[0]
    outcome.counts["read"] += 1
    yield job.to_bytes
    yield lambda: [graph_text(block.graph) for block in job.blocks] + [repr(job)]
    if not runs or _is_long(job):
        return
    outcome.counts["tried to run"] += 1
    limits, found = LIMITS, "ran"
    try:
        sample.model.check(job, limits=LIMITS)
    except LimitError:
        found = "ran, though refused"
    except InsituError:  # what stands before the line that is wrong runs
        limits, found = UNCHECKED, "ran, though wrong"
    yield lambda: sample.model.run(job, limits=limits).to_bytes()
    outcome.counts[found] += 1


def _is_long(job: Job) -> bool:
    """Whether a generation would only be long: its tokens are bounded by `operations`."""
    return any((block.options.get("max_new_tokens") or 99) > 99 for block in job.blocks[1:])


def resident() -> int:
    """The memory of this process, in bytes."""
    return resident_of(os.getpid())


def resident_of(pid: int) -> int:
    """The memory of a process, in bytes."""
    with open(f"/proc/{pid}/statm") as told:
        return int(told.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def mutate(
    count: int, runs: int, seed: int, said: Callable[[str], object] | None = None
) -> Outcome:
    """Tries many jobs.

    Args:
        count: how many are made.
        runs: how many of those that can be read are run, spread over all.
        seed: of what is changed.
        said: is told now and then how far it is.
    """
    torch.set_num_threads(1)
    outcome, models = Outcome(), {id(one.model): one.model for one in samples()}
    before = {number: _state(model) for number, model in models.items()}
    base = told = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            tried(number, seed, outcome.counts["tried to run"] < runs * number / count, outcome)
            if number == count // 10:
                gc.collect()
                base = resident()
            if said is not None and number and number % max(count // 50, 1) == 0:
                said(f"{number}: {dict(outcome.counts)}, slowest {outcome.slowest}")
            for wrong in outcome.wrong[told:] if said is not None else ():
                said(f"WRONG {wrong[0]}: {wrong[1]}")
            told = len(outcome.wrong)
    gc.collect()
    outcome.growth = resident() - base
    for number, model in models.items():
        for name, one in _state(model).items():
            if not torch.equal(one, before[number][name]):
                outcome.wrong.append((-1, f"{name} of the model has changed"))
        if any(one.grad is not None for one in model.module.parameters()):
            outcome.wrong.append((-1, "a parameter has a gradient"))
        if any(one._forward_hooks or one._forward_pre_hooks for one in model.module.modules()):
            outcome.wrong.append((-1, "a module has a hook"))
    return outcome


def _state(model: Model) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in model.module.state_dict().items()}


def main() -> int:
    """Tries jobs, and says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, default=None, help="Try the job of this number alone.")
    given = parser.parse_args()
    if given.only is not None:
        outcome = Outcome()
        tried(given.only, given.seed, True, outcome)
    else:
        runs = given.count // 10 if given.runs is None else given.runs
        outcome = mutate(given.count, runs, given.seed, lambda line: print(line, flush=True))
    print(f"{dict(outcome.counts)}\nslowest: {outcome.slowest}; grown: {outcome.growth:,} bytes")
    print(f"{len(outcome.wrong)} wrong, among them {outcome.wrong[-3:]}")
    return bool(outcome.wrong) or outcome.growth > GROWTH


if __name__ == "__main__":
    sys.exit(main())
