"""What the run of a block would take: estimates from its plan, and from forwards without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from insitu.batching.procedure import Subject
from insitu.batching.summary import Planned, Summary
from insitu.engine.counts import Counts
from insitu.engine.probe import Call
from insitu.graph.errors import UnknownShapeError
from insitu.tracing.job_binding import Bound

_NONE = Counts(0.0, 0, 0, 0)


class BlockCosts(NamedTuple):
    """What the passes of a block take.

    Attributes:
        flops: floating-point operations of the model.
        bytes: what the largest pass holds at once, beside the weights.
        how: how that was found out.
    """

    flops: float
    bytes: int
    how: str


def model_costs(model: Subject, bound: Bound, plan: Planned) -> BlockCosts:
    """Returns what the model's passes of a block take.

    Args:
        model: the model.
        bound: the block.
        plan: its passes.
    """
    calls = [bound.procedure.example(request) for request in bound.requests]
    counts = _counted(model, calls)
    steps = [bound.procedure.steps_of(request) or 1 for request in bound.requests]
    keeps = bound.lines.graph.differentiates
    flops, most = 0.0, 0
    ways: set[str] = set()
    for single in plan.passes:
        own = [(calls[number], counts[number]) for number in single.invocations]
        most_steps = max(steps[number] for number in single.invocations)
        if single.flops:
            flops += single.flops
            ways.add("by the sizes of the blocks that its passes run")
        else:
            flops += sum(
                counts[at].flops * (1 + (steps[at] - 1) / _places(calls[at])[1])
                for at in single.invocations
            )
            ways.add(
                "left out: no forward can be made without data"
                if _NONE in (count for _, count in own)
                else "in forwards without data" + ", further steps in proportion" * (most_steps > 1)
            )
        most = max(most, _bytes(single, own, most_steps, keeps))
    return BlockCosts(flops, most, " and ".join(sorted(ways)))


def _counted(model: Subject, calls: Sequence[Call]) -> list[Counts]:
    """What a forward of each prompt takes; nothing where that cannot be counted."""
    known: dict[str, Counts] = {}
    found: list[Counts] = []
    for call in calls:
        signature = call.signature()
        if signature not in known:
            try:
                known[signature] = model.count(call)
            except UnknownShapeError:
                known[signature] = _NONE
        found.append(known[signature])
    return found


def _places(call: Call) -> tuple[int, int]:
    """How many rows and positions a call has: those of a decoder, if it has one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        given = call.kwargs.get(name)
        if isinstance(given, torch.Tensor):
            return given.shape[0], max(given.shape[1], 1)
    return 1, 1


def _bytes(single: Summary, own: Sequence[tuple[Call, Counts]], steps: int, keeps: bool) -> int:
    """What a pass holds at once: with `keeps`, all that autograd may keep of it."""
    found = 0.0
    for call, count in own:
        rows, positions = _places(call)
        held = count.peak + (count.made if keeps else 0)
        held += count.left * (steps - 1) / positions  # its cache grows with each step
        if single.rows:  # which of its own places it shares with others is not looked at
            held *= single.rows * single.positions / (rows * positions * len(own))
        found += held
    return int(found)
