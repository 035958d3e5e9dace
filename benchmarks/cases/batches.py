"""Many prompts: of different lengths in one trace, and collecting what one block returns."""

from __future__ import annotations

import torch
from plain import logits, on_output
from subjects import STEERED, tokens
from torch.nn.utils.rnn import pad_sequence

from cases import Cases, Subject

PROMPTS = 64
COLLECTED = 512
BATCH = 32


def ragged(subject: Subject) -> Cases:
    """Returns the logits at the last position of 64 prompts of 4 to 64 tokens."""
    module, model = subject.module, subject.model
    lengths = torch.randint(4, 65, (PROMPTS,), generator=torch.Generator().manual_seed(3))
    prompts = [tokens(module, int(length), at) for at, length in enumerate(lengths)]

    def insitu() -> list[torch.Tensor]:
        kept = []
        with model.trace() as tracer:
            for prompt in prompts:
                with tracer.invoke(prompt):
                    kept.append(model.lm_head.output[0, -1].save())
        return [proxy.value for proxy in kept]

    def alone() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        with on_output(subject.modules.head, lambda value: kept.append(value[0, -1].clone())):
            for prompt in prompts:
                logits(module, prompt)
        return kept

    def padded() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        ids = pad_sequence([prompt[0] for prompt in prompts], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()

        def keep(value: torch.Tensor) -> None:
            kept.extend(value[torch.arange(PROMPTS), lengths - 1])

        with on_output(subject.modules.head, keep):
            logits(module, ids, attention_mask=mask)
        return kept

    return {
        "insitu": insitu,
        "hooks, one by one": alone,
        "hooks, padded to the longest": padded,
    }


def collecting(subject: Subject) -> Cases:
    """Returns the output of block 6 over 512 prompts of 16 tokens, `(16, d_model)` each."""
    module, model = subject.module, subject.model
    prompts = torch.cat([tokens(module, 16, seed) for seed in range(COLLECTED)])
    batches = prompts.split(BATCH)

    def insitu() -> list[torch.Tensor]:
        kept = []
        for batch in batches:
            with model.trace() as tracer:
                for row in range(BATCH):
                    with tracer.invoke(batch[row : row + 1]):
                        kept.append(subject.handles.blocks[STEERED].output[0].save())
        return [proxy.value[0] for proxy in kept]

    def full() -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        block = subject.modules.blocks[STEERED]
        with on_output(block, lambda value: kept.extend(value.clone())):
            for batch in batches:
                logits(module, batch)
        return kept

    return {
        "insitu": insitu,
        "hooks, full forwards": full,
    }
