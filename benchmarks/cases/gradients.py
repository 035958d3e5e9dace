"""Attribution patching (Nanda 2023; Syed et al. 2023): all patches estimated by one backward."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from plain import collect, logits, on_output
from subjects import LENGTH, tokens

from cases import Cases, Subject

RIGHT, WRONG = 5, 7  # the tokens whose difference of logits is explained


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
