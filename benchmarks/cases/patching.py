"""Patching besides the sweep: single heads, and causal tracing with noise (Meng et al. 2022)."""

from __future__ import annotations

import torch
from plain import Change, collect, logits, on_input, on_output
from subjects import HEADS, LENGTH, numbers, tokens

from cases import Cases, Subject

SAMPLES = 10
SUBJECT = slice(2, 6)  # the positions that get noise
RESTORED = 5


def heads(subject: Subject) -> Cases:
    """Returns the logits at the last position for every block and head, patched everywhere."""
    module, model = subject.module, subject.model
    projections = subject.modules.projections
    clean_ids, ids = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)
    width = module.config.hidden_size // HEADS
    slices = [slice(head * width, (head + 1) * width) for head in range(HEADS)]

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            with tracer.invoke(clean_ids):
                clean = [projection.input for projection in subject.handles.projections]
            for projection, donor in zip(subject.handles.projections, clean, strict=True):
                for head in slices:
                    with tracer.invoke(ids):
                        projection.input[:, :, head] = donor[:, :, head]
                        kept.append(model.lm_head.output[0, -1].save())
        return [proxy.value for proxy in kept]

    def one(donor: torch.Tensor, head: slice) -> Change:
        def patch(value: torch.Tensor) -> None:
            value[:, :, head] = donor[:, :, head]

        return patch

    def a_head_a_row(donor: torch.Tensor) -> Change:
        def patch(value: torch.Tensor) -> None:
            for row, head in enumerate(slices):
                value[row, :, head] = donor[0, :, head]

        return patch

    def naive() -> list[torch.Tensor]:
        kept = []
        clean = collect(module, projections, clean_ids, on_input)
        for projection, donor in zip(projections, clean, strict=True):
            for head in slices:
                with on_input(projection, one(donor, head)):
                    kept.append(logits(module, ids)[0, -1].clone())
        return kept

    def batched() -> list[torch.Tensor]:
        kept = []
        clean = collect(module, projections, clean_ids, on_input)
        for projection, donor in zip(projections, clean, strict=True):
            with on_input(projection, a_head_a_row(donor)):
                kept.extend(logits(module, ids.expand(HEADS, -1))[:, -1].clone())
        return kept

    return {
        "bare": lambda: [logits(module, ids)],
        "insitu": insitu,
        "hooks, a run each": naive,
        "hooks, a batch per layer": batched,
    }


def tracing(subject: Subject) -> Cases:
    """Returns the last position's logits for every block restored and each of ten noises."""
    module, model = subject.module, subject.model
    blocks, embedding = subject.modules.blocks, subject.modules.embedding
    handles = subject.handles
    ids = tokens(module, LENGTH, 1)
    noise = 0.1 * numbers(SAMPLES, SUBJECT.stop - SUBJECT.start, module.config.hidden_size, seed=5)

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            with tracer.invoke(ids):
                clean = [block.output[0] for block in handles.blocks]
            for block, donor in zip(handles.blocks, clean, strict=True):
                for sample in noise:
                    with tracer.invoke(ids):
                        handles.embedding.output[:, SUBJECT] += sample
                        block.output[0][:, RESTORED] = donor[:, RESTORED]
                        kept.append(model.lm_head.output[0, -1].save())
        return [proxy.value for proxy in kept]

    def adding(sample: torch.Tensor) -> Change:
        def add(value: torch.Tensor) -> None:
            value[:, SUBJECT] += sample

        return add

    def restoring(donor: torch.Tensor) -> Change:
        def restore(value: torch.Tensor) -> None:
            value[:, RESTORED] = donor[:, RESTORED]

        return restore

    def naive() -> list[torch.Tensor]:
        kept = []
        for block, donor in zip(blocks, collect(module, blocks, ids, on_output), strict=True):
            for sample in noise:
                with on_output(embedding, adding(sample)), on_output(block, restoring(donor)):
                    kept.append(logits(module, ids)[0, -1].clone())
        return kept

    def batched() -> list[torch.Tensor]:
        kept = []
        for block, donor in zip(blocks, collect(module, blocks, ids, on_output), strict=True):
            with on_output(embedding, adding(noise)), on_output(block, restoring(donor)):
                kept.extend(logits(module, ids.expand(SAMPLES, -1))[:, -1].clone())
        return kept

    return {
        "bare": lambda: [logits(module, ids)],
        "insitu": insitu,
        "hooks, a run each": naive,
        "hooks, a batch per layer": batched,
    }
