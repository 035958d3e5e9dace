"""Edge attribution (Syed et al. 2023) of 16 pairs: what replacing each edge would change."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from plain import on_input, on_output
from subjects import LENGTH, tokens
from torch import nn

from cases import Cases, Subject
from cases.gradients import PAIRS, RIGHT, WRONG
from insitu.methods import edge_attribution, logit_difference


def edges(subject: Subject) -> Cases:
    """Returns the scores of all edges of each pair, `(sender, receiver)`, 0 where there is none.

    Both orders of senders and receivers are those of `edge_attribution`. The case "bare" is what
    the estimate cannot do without: a forward of each prompt and a backward. It is compared with
    nothing.
    """
    module, model = subject.module, subject.model
    clean = torch.cat([tokens(module, LENGTH, at) for at in range(PAIRS)])
    corrupted = torch.cat([tokens(module, LENGTH, at + PAIRS) for at in range(PAIRS)])

    def insitu() -> list[torch.Tensor]:
        metric = logit_difference(RIGHT, WRONG)
        found = edge_attribution(model, clean.tolist(), corrupted.tolist(), metric, progress=False)
        return list(found.values.nan_to_num())

    def bare() -> list[torch.Tensor]:
        with torch.no_grad():
            module(corrupted, use_cache=False)
        start: list[torch.Tensor] = []
        with on_output(module.transformer.wte, start.append):
            loss = _loss(module(clean, use_cache=False).logits)
        return list(torch.autograd.grad(loss, start))

    def batched() -> list[torch.Tensor]:
        return list(_by_hand(module, clean, corrupted))

    return {"bare": bare, "insitu": insitu, "hooks, one batch": batched}


def _loss(logits: torch.Tensor) -> torch.Tensor:
    last = logits[:, -1]
    return (last[:, RIGHT] - last[:, WRONG]).sum()


def _watched(module: nn.Module, ids: torch.Tensor) -> tuple[dict[Any, torch.Tensor], torch.Tensor]:
    """What stands at the places of a GPT-2 that edges begin and end at, and its logits."""
    found: dict[Any, torch.Tensor] = {}

    def keep(key: Any) -> Any:
        return lambda value: found.update({key: value})

    with ExitStack() as stack:
        for layer, block in enumerate(module.transformer.h):
            for hook in (
                on_input(block.ln_1, keep((layer, "start"))),
                on_output(block.attn.c_attn, keep((layer, "qkv"))),
                on_input(block.attn.c_proj, keep((layer, "z"))),
                on_input(block.ln_2, keep((layer, "middle"))),
                on_output(block.ln_2, keep((layer, "norm"))),
                on_output(block.mlp, keep((layer, "mlp"))),
            ):
                stack.enter_context(hook)
        stack.enter_context(on_input(module.transformer.ln_f, keep("end")))
        logits = module(ids, use_cache=False).logits
    return found, logits


def _by_hand(module: nn.Module, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """The scores of all edges of a GPT-2, `(pair, sender, receiver)`, of all pairs in one batch."""
    blocks, heads = module.transformer.h, module.config.n_head
    (pairs, length), width = clean.shape, module.config.n_embd
    size = width // heads
    with torch.no_grad():
        other, _ = _watched(module, corrupted)
    own, logits = _watched(module, clean)
    read = [key for key in own if key == "end" or key[1] in ("qkv", "norm")]
    found = torch.autograd.grad(_loss(logits), [own[key] for key in read])
    slopes = dict(zip(read, found, strict=True))
    with torch.no_grad():
        count = 1 + len(blocks) * (heads + 1)
        added = clean.new_empty(pairs, count, length, width, dtype=logits.dtype)
        scores = added.new_zeros(pairs, count, len(blocks) * (3 * heads + 1) + 1)
        added[:, 0] = other[0, "start"] - own[0, "start"]
        senders, receivers = 1, 0

        def score(gradients: torch.Tensor) -> None:
            nonlocal receivers
            products = added[:, :senders].flatten(2) @ gradients.flatten(2).mT
            scores[:, :senders, receivers : receivers + gradients.shape[1]] = products
            receivers += gradients.shape[1]

        for layer, block in enumerate(blocks):
            into = block.attn.c_attn.weight.view(width, 3 * heads, size).permute(1, 2, 0)
            made = slopes[layer, "qkv"].view(pairs, length, 3 * heads, size).transpose(1, 2)
            score(_through(block.ln_1, own[layer, "start"], made @ into))
            out = block.attn.c_proj.weight.view(heads, size, width)
            change = (other[layer, "z"] - own[layer, "z"]).view(pairs, length, heads, size)
            torch.matmul(change.transpose(1, 2), out, out=added[:, senders : senders + heads])
            senders += heads
            score(_through(block.ln_2, own[layer, "middle"], slopes[layer, "norm"][:, None]))
            added[:, senders] = other[layer, "mlp"] - own[layer, "mlp"]
            senders += 1
        score(slopes["end"][:, None])
    return scores


def _through(norm: nn.LayerNorm, at: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """Gradients `(pair, receiver, position, d_model)` back through a norm of `at`."""
    at = at[:, None].expand_as(slopes).detach().requires_grad_()
    with torch.enable_grad():
        made = norm(at)
    return torch.autograd.grad(made, at, slopes)[0]
