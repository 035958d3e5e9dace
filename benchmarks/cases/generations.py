"""Generations of many prompts: each steered in every step, and each sampled from its seed."""

from __future__ import annotations

import torch
from plain import Change, on_output
from subjects import STEERED, numbers, tokens
from torch import nn

from cases import Cases, Subject

PROMPTS = 32
STEPS = 20


def _prompts(module: nn.Module) -> list[torch.Tensor]:
    """Prompts of 4 to 32 tokens, `(1, position)` each."""
    lengths = torch.randint(4, 33, (PROMPTS,), generator=torch.Generator().manual_seed(5))
    return [tokens(module, int(length), at) for at, length in enumerate(lengths)]


def _padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts as one batch with padding before them."""
    length = max(prompt.shape[1] for prompt in prompts)
    rows = [nn.functional.pad(prompt, (length - prompt.shape[1], 0)) for prompt in prompts]
    masks = [
        nn.functional.pad(torch.ones_like(prompt), (length - prompt.shape[1], 0))
        for prompt in prompts
    ]
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}


def steered(subject: Subject) -> Cases:
    """Returns the tokens of 32 ragged prompts, each with a vector added in every step."""
    module, model = subject.module, subject.model
    block, handle = subject.modules.blocks[STEERED], subject.handles.blocks[STEERED]
    prompts = _prompts(module)
    vectors = [numbers(module.config.hidden_size, seed=at) for at in range(PROMPTS)]
    options = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def insitu() -> list[torch.Tensor]:
        invokers = []
        with model.generate(**options) as generator:
            for prompt, vector in zip(prompts, vectors, strict=True):
                with generator.invoke(prompt) as invoker, generator.every_step():
                    handle.output[0][:, -1] += vector
                invokers.append(invoker)
        return [invoker.output[0, -STEPS:].float() for invoker in invokers]

    def adding(vector: torch.Tensor) -> Change:
        def change(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[:, -1] += vector
            return value

        return change

    def alone() -> list[torch.Tensor]:
        kept = []
        for prompt, vector in zip(prompts, vectors, strict=True):
            with on_output(block, adding(vector)):
                mask = torch.ones_like(prompt)
                found = module.generate(prompt, attention_mask=mask, **options)
            kept.append(found[0, -STEPS:].float())
        return kept

    def batched() -> list[torch.Tensor]:
        with on_output(block, adding(torch.stack(vectors))):
            found = module.generate(**_padded(prompts), **options)
        return list(found[:, -STEPS:].float())

    return {"insitu": insitu, "hooks, one by one": alone, "hooks, one batch": batched}


def sampled(subject: Subject) -> Cases:
    """Returns the tokens of 32 ragged prompts that are sampled, each from its seed.

    The case "bare" is a plain batch of them without seeds, and compared with nothing.
    """
    module, model = subject.module, subject.model
    prompts = _prompts(module)
    options = {
        "max_new_tokens": STEPS,
        "do_sample": True,
        "top_k": 50,
        "top_p": 0.95,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def insitu() -> list[torch.Tensor]:
        invokers = []
        with model.generate(**options) as generator:
            for seed, prompt in enumerate(prompts):
                with generator.invoke(prompt, seed=seed) as invoker:
                    invokers.append(invoker)
        return [invoker.output[0, -STEPS:].float() for invoker in invokers]

    def alone() -> list[torch.Tensor]:
        kept = []
        with torch.random.fork_rng():
            for seed, prompt in enumerate(prompts):
                torch.manual_seed(seed)
                mask = torch.ones_like(prompt)
                found = module.generate(prompt, attention_mask=mask, **options)
                kept.append(found[0, -STEPS:].float())
        return kept

    def batched() -> list[torch.Tensor]:
        return list(module.generate(**_padded(prompts), **options)[:, -STEPS:].float())

    return {"bare": batched, "insitu": insitu, "plain, one by one": alone}
