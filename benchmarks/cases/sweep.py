"""Layer by position patching: one prompt's residual stream put into another's, a place a run."""

from __future__ import annotations

from typing import Any

import torch
from plain import Change, collect, logits, on_output
from subjects import tokens
from torch.utils.flop_counter import FlopCounterMode

from cases import Cases, Subject
from insitu import Proxy


def invocations(subject: Subject, length: int) -> tuple[Any, list[Proxy]]:
    """Runs the sweep with Insitu; returns its tracer and what it saved."""
    model, kept = subject.model, []
    clean_ids, ids = tokens(subject.module, length, 1), tokens(subject.module, length, 2)
    with model.trace() as tracer:
        with tracer.invoke(clean_ids):
            clean = [block.output[0] for block in subject.handles.blocks]
        for block, donor in zip(subject.handles.blocks, clean, strict=True):
            for position in range(length):
                with tracer.invoke(ids):
                    block.output[0][:, position] = donor[:, position]
                    kept.append(model.lm_head.output[0, -1].save())
    return tracer, kept


def operations(subject: Subject, length: int) -> tuple[float, float]:
    """Returns the floating-point operations that torch counts in the sweep, and the plan's."""
    with FlopCounterMode(display=False) as counter:
        tracer, _ = invocations(subject, length)
    return counter.get_total_flops(), tracer.plan.flops


def sweep(subject: Subject, length: int) -> Cases:
    """Returns the last position's logits for every block and position, `(vocabulary,)` each."""
    module, blocks = subject.module, subject.modules.blocks
    clean_ids, ids = tokens(module, length, 1), tokens(module, length, 2)

    def insitu() -> list[torch.Tensor]:
        return [proxy.value for proxy in invocations(subject, length)[1]]

    def one(donor: torch.Tensor, position: int) -> Change:
        def patch(value: torch.Tensor) -> None:
            value[:, position] = donor[:, position]

        return patch

    def all_positions(donor: torch.Tensor) -> Change:
        def patch(value: torch.Tensor) -> None:
            rows = torch.arange(length)
            value[rows, rows] = donor[0]

        return patch

    def naive() -> list[torch.Tensor]:
        kept = []
        for block, donor in zip(blocks, collect(module, blocks, clean_ids, on_output), strict=True):
            for position in range(length):
                with on_output(block, one(donor, position)):
                    kept.append(logits(module, ids)[0, -1].clone())
        return kept

    def batched(**options: int) -> list[torch.Tensor]:
        kept = []
        for block, donor in zip(blocks, collect(module, blocks, clean_ids, on_output), strict=True):
            with on_output(block, all_positions(donor)):
                found = logits(module, ids.expand(length, -1), **options)
            kept.extend(found[:, -1].clone())
        return kept

    long = length > 16  # then a run each takes minutes
    return {
        "bare": lambda: [logits(module, ids)],
        "insitu": insitu,
        **({} if long else {"hooks, a run each": naive}),
        "hooks, a batch per layer": batched,
        "the same, last logits only": lambda: batched(logits_to_keep=1),
    }
