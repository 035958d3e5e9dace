"""Single runs and what is repeated: steering, a logit lens, a trace in a loop."""

from __future__ import annotations

import torch
from plain import Change, logits, on_output
from subjects import LENGTH, STEERED, STRENGTHS, numbers, tokens

from cases import Cases, Subject


def steering(subject: Subject) -> Cases:
    """Returns the logits at the last position for ten strengths of a vector added to block 6."""
    module, model = subject.module, subject.model
    block, handle = subject.modules.blocks[STEERED], subject.handles.blocks[STEERED]
    ids, vector = tokens(module, LENGTH, 1), numbers(module.config.hidden_size, seed=4)
    strengths = torch.tensor(STRENGTHS)

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            for strength in STRENGTHS:
                with tracer.invoke(ids):
                    handle.output[0] += strength * vector
                    kept.append(model.lm_head.output[0, -1].save())
        return [proxy.value for proxy in kept]

    def adding(what: torch.Tensor) -> Change:
        return lambda value: value + what

    def naive() -> list[torch.Tensor]:
        kept = []
        for strength in STRENGTHS:
            with on_output(block, adding(strength * vector)):
                kept.append(logits(module, ids)[0, -1].clone())
        return kept

    def batched() -> list[torch.Tensor]:
        with on_output(block, adding(strengths[:, None, None] * vector)):
            return list(logits(module, ids.expand(len(STRENGTHS), -1))[:, -1].clone())

    return {
        "bare": lambda: [logits(module, ids)],
        "insitu": insitu,
        "hooks, a run each": naive,
        "hooks, one batch": batched,
    }


def lens(subject: Subject) -> Cases:
    """Returns what every block would predict at the last position, `(vocabulary,)` each."""
    module, model = subject.module, subject.model
    handles, plain = subject.handles, subject.modules
    ids = tokens(module, LENGTH, 1)

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace(ids):
            for block in handles.blocks:
                kept.append(handles.head(handles.norm(block.output[0][:, -1]))[0].save())
        return [proxy.value for proxy in kept]

    def hooks() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        handles = [
            on_output(block, lambda value: kept.append(plain.head(plain.norm(value[:, -1]))[0]))
            for block in plain.blocks
        ]
        logits(module, ids)
        for handle in handles:
            handle.remove()
        return kept

    return {"bare": lambda: [logits(module, ids)], "insitu": insitu, "hooks": hooks}


def loop(subject: Subject) -> Cases:
    """Returns the logits of one prompt: a trace that is recorded again each time."""
    module, model = subject.module, subject.model
    ids = tokens(module, LENGTH, 1)

    def insitu() -> list[torch.Tensor]:
        with model.trace(ids):
            kept = model.lm_head.output.save()
        return [kept.value]

    def hooks() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        with on_output(subject.modules.head, lambda value: kept.append(value.clone())):
            logits(module, ids)
        return kept

    return {"bare": lambda: [logits(module, ids)], "insitu": insitu, "hooks": hooks}
