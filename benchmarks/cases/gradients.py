"""Gradients: of one pair of prompts and of 16, and of many ragged prompts in one batch.

Attribution patching (Nanda 2023; Syed et al. 2023) estimates all patches by one backward pass.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from plain import collect, logits, on_output
from subjects import LENGTH, tokens
from torch import nn

from cases import Cases, Subject

RIGHT, WRONG = 5, 7  # the tokens whose difference of logits is explained
PROMPTS, PAIRS = 32, 16


def attribution(subject: Subject) -> Cases:
    """Returns for every block what patching it would do at each position, `(position,)` each."""
    module, blocks = subject.module, subject.modules.blocks
    model, handles = subject.model, subject.handles
    clean_ids, ids = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            with tracer.invoke(clean_ids):
                clean = [block.output[0] for block in handles.blocks]
            with tracer.invoke(ids):
                for block, donor in zip(handles.blocks, clean, strict=True):
                    value = block.output[0]
                    kept.append(((donor - value) * value.grad).sum(-1)[0].save())
                last = model.lm_head.output[0, -1]
                (last[RIGHT] - last[WRONG]).backward()
        return [proxy.value for proxy in kept]

    def hooks() -> list[torch.Tensor]:
        clean = collect(module, blocks, clean_ids, on_output)
        values: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(on_output(block, values.append))
            last = module(ids, use_cache=False).logits[0, -1]
        grads = torch.autograd.grad(last[RIGHT] - last[WRONG], values)
        found = zip(clean, values, grads, strict=True)
        return [((donor - value) * grad).sum(-1)[0].detach() for donor, value, grad in found]

    return {"bare": lambda: [logits(module, ids)], "insitu": insitu, "hooks": hooks}


def pairs(subject: Subject) -> Cases:
    """Returns the same for 16 pairs of prompts, all blocks of a pair in one tensor."""
    module, blocks = subject.module, subject.modules.blocks
    model, handles = subject.model, subject.handles
    given = [
        (tokens(module, LENGTH, at), tokens(module, LENGTH, at + PAIRS)) for at in range(PAIRS)
    ]

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            for clean_ids, ids in given:
                with tracer.invoke(clean_ids):
                    clean = [block.output[0] for block in handles.blocks]
                with tracer.invoke(ids):
                    found = []
                    for block, donor in zip(handles.blocks, clean, strict=True):
                        value = block.output[0]
                        found.append(((donor - value) * value.grad).sum(-1)[0])
                    last = model.lm_head.output[0, -1]
                    (last[RIGHT] - last[WRONG]).backward()
                    kept.append(torch.stack(found).save())
        return [proxy.value for proxy in kept]

    def batched() -> list[torch.Tensor]:
        clean = collect(module, blocks, torch.cat([one for one, _ in given]), on_output)
        values: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(on_output(block, values.append))
            last = module(torch.cat([ids for _, ids in given]), use_cache=False).logits[:, -1]
        grads = torch.autograd.grad((last[:, RIGHT] - last[:, WRONG]).sum(), values)
        parts = zip(clean, values, grads, strict=True)
        found = [((donor - value) * grad).sum(-1) for donor, value, grad in parts]
        return list(torch.stack(found, 1).detach())

    return {"insitu": insitu, "hooks, one batch": batched}


def ragged(subject: Subject) -> Cases:
    """Returns the gradients at the last position after six blocks, of 32 ragged prompts."""
    module, model = subject.module, subject.model
    blocks, handles = subject.modules.blocks[::2], subject.handles.blocks[::2]
    lengths = torch.randint(4, 33, (PROMPTS,), generator=torch.Generator().manual_seed(5))
    prompts = [tokens(module, int(length), at) for at, length in enumerate(lengths)]

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    grads = [block.output[0].grad[0, -1] for block in handles]
                    kept.append(torch.stack(grads).save())
                    last = model.lm_head.output[0, -1]
                    (last[RIGHT] - last[WRONG]).backward()
        return [proxy.value for proxy in kept]

    def taken(ids: torch.Tensor, ends: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        values: list[torch.Tensor] = []
        rows = torch.arange(len(ids))
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(on_output(block, values.append))
            last = module(ids, use_cache=False, **options).logits[rows, ends]
        grads = torch.autograd.grad((last[:, RIGHT] - last[:, WRONG]).sum(), values)
        return torch.stack([grad[rows, ends] for grad in grads], 1)

    def alone() -> list[torch.Tensor]:
        return [taken(ids, torch.tensor([ids.shape[1] - 1]))[0] for ids in prompts]

    def batched() -> list[torch.Tensor]:
        longest = int(lengths.max())
        rows = [nn.functional.pad(ids[0], (0, longest - ids.shape[1])) for ids in prompts]
        mask = torch.arange(longest) < lengths[:, None]
        return list(taken(torch.stack(rows), lengths - 1, attention_mask=mask.long()))

    return {"insitu": insitu, "hooks, one by one": alone, "hooks, one batch": batched}
