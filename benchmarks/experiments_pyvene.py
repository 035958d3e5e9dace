"""The experiments with pyvene, in an environment of its own. Run by `experiments.py`."""

from __future__ import annotations

import pyvene
import torch
from peers import Cases, tell
from plain import logits
from subjects import HEADS, LAYERS, LENGTH, STEERED, STRENGTHS, gpt2, numbers, tokens

module = gpt2()
clean_ids, ids = tokens(module, LENGTH, 1), tokens(module, LENGTH, 2)
torch.set_grad_enabled(False)


def bare() -> list[torch.Tensor]:
    return [logits(module, ids)]


def patching(component: str, unit: str, places: int) -> Cases:
    """One wrapped model per layer, as the library has it; each call runs the clean prompt too."""
    layers = [{"layer": layer, "component": component, "unit": unit} for layer in range(LAYERS)]
    models = [
        pyvene.IntervenableModel(
            pyvene.IntervenableConfig([layer], pyvene.VanillaIntervention), module
        )
        for layer in layers
    ]

    def a_run_each() -> list[torch.Tensor]:
        kept = []
        for model in models:
            for place in range(places):
                base, source = {"input_ids": ids}, {"input_ids": clean_ids}
                _, found = model(base, [source], {"sources->base": place})
                kept.append(found.logits[0, -1].clone())
        return kept

    def a_batch_per_layer() -> list[torch.Tensor]:
        kept = []
        where = [[[place] for place in range(places)]]
        for model in models:
            base = {"input_ids": ids.expand(places, -1)}
            source = {"input_ids": clean_ids.expand(places, -1)}
            _, found = model(base, [source], {"sources->base": (where, where)})
            kept.extend(found.logits[:, -1].clone())
        return kept

    return {"bare": bare, "a run each": a_run_each, "a batch per layer": a_batch_per_layer}


def sweep() -> Cases:
    return patching("block_output", "pos", LENGTH)


def heads() -> Cases:
    return patching("head_attention_value_output", "h", HEADS)


def steering() -> Cases:
    vector = numbers(module.config.n_embd, seed=4)

    def a_run_each() -> list[torch.Tensor]:
        kept = []
        for strength in STRENGTHS:
            config = pyvene.IntervenableConfig(
                {
                    "layer": STEERED,
                    "component": "block_output",
                    "source_representation": strength * vector,
                },
                pyvene.AdditionIntervention,
            )
            model = pyvene.IntervenableModel(config, module)
            everywhere = {"base": list(range(LENGTH))}
            _, found = model({"input_ids": clean_ids}, unit_locations=everywhere)
            kept.append(found.logits[0, -1].clone())
        return kept

    return {"bare": bare, "a run each": a_run_each}


def lens() -> Cases:
    layers = [{"layer": layer, "component": "block_output"} for layer in range(LAYERS)]
    config = pyvene.IntervenableConfig(layers, pyvene.CollectIntervention)
    model = pyvene.IntervenableModel(config, module)

    def one_run() -> list[torch.Tensor]:
        (_, collected), _ = model({"input_ids": clean_ids}, unit_locations={"base": LENGTH - 1})
        norm, head = module.transformer.ln_f, module.lm_head
        return [head(norm(value)).flatten() for value in collected]

    return {"bare": bare, "one run": one_run}


if __name__ == "__main__":
    tell(
        "pyvene",
        {
            "sweep 12 x 16": sweep,
            "heads 12 x 12": heads,
            "steering": steering,
            "logit lens": lens,
        },
    )
