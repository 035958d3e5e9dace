"""The experiments with TransformerLens, in an environment of its own. Run by `experiments.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import Cases, tell
from plain import logits
from subjects import HEADS, LAYERS, LENGTH, STEERED, STRENGTHS, gpt2, numbers, tokens
from transformer_lens.model_bridge.sources import build_bridge_from_module

module = gpt2()  # as it is: the library changes the modules of the one that it is given
model = build_bridge_from_module(gpt2(), "GPT2LMHeadModel", hf_config=module.config)
clean_ids, ids = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)
torch.set_grad_enabled(False)


def bare() -> list[torch.Tensor]:
    return [logits(module, ids)]


def stream(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def mixed(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"


def patched(hook_name: str, donor: torch.Tensor, places: list[tuple]) -> list[torch.Tensor]:
    """Runs the prompt once for each place, with that place of an activation taken from a donor."""
    rows = ids.expand(len(places), -1)

    def patch(value: torch.Tensor, hook: object) -> torch.Tensor:
        for row, place in enumerate(places):
            value[(row, *place)] = donor[(0, *place)]
        return value

    found = model.run_with_hooks(rows, fwd_hooks=[(hook_name, patch)])
    return list(found[:, -1].clone())


def patching(named: Callable[[int], str], places: list[tuple]) -> Cases:
    def cached() -> dict[str, torch.Tensor]:
        names = {named(layer) for layer in range(LAYERS)}
        return model.run_with_cache(clean_ids, names_filter=lambda name: name in names)[1]

    def a_run_each() -> list[torch.Tensor]:
        cache, kept = cached(), []
        for layer in range(LAYERS):
            for place in places:
                kept += patched(named(layer), cache[named(layer)], [place])
        return kept

    def a_batch_per_layer() -> list[torch.Tensor]:
        cache, kept = cached(), []
        for layer in range(LAYERS):
            kept += patched(named(layer), cache[named(layer)], places)
        return kept

    return {"bare": bare, "a run each": a_run_each, "a batch per layer": a_batch_per_layer}


def sweep() -> Cases:
    return patching(stream, [(position,) for position in range(LENGTH)])


def heads() -> Cases:
    return patching(mixed, [(slice(None), head) for head in range(HEADS)])


def steering() -> Cases:
    vector, strengths = numbers(module.config.n_embd, seed=4), torch.tensor(STRENGTHS)

    def steered(rows: torch.Tensor, added: torch.Tensor) -> list[torch.Tensor]:
        def add(value: torch.Tensor, hook: object) -> torch.Tensor:
            return value + added

        found = model.run_with_hooks(rows, fwd_hooks=[(stream(STEERED), add)])
        return list(found[:, -1].clone())

    def a_run_each() -> list[torch.Tensor]:
        return [
            logits for strength in STRENGTHS for logits in steered(clean_ids, strength * vector)
        ]

    def one_batch() -> list[torch.Tensor]:
        rows = clean_ids.expand(len(STRENGTHS), -1)
        return steered(rows, strengths[:, None, None] * vector)

    return {"bare": bare, "a run each": a_run_each, "one batch": one_batch}


def lens() -> Cases:
    def cached() -> list[torch.Tensor]:
        names = {stream(layer) for layer in range(LAYERS)}
        _, cache = model.run_with_cache(clean_ids, names_filter=lambda name: name in names)
        last = [cache[stream(layer)][:, -1:] for layer in range(LAYERS)]
        return [model.unembed(model.ln_final(value))[0, 0] for value in last]

    return {"bare": bare, "from its cache": cached}


if __name__ == "__main__":
    tell(
        "transformer-lens",
        {
            "sweep 12 x 16": sweep,
            "heads 12 x 12": heads,
            "steering": steering,
            "logit lens": lens,
        },
    )
