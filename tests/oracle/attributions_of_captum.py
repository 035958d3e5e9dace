"""Writes down what captum attributes to the tokens of a prompt.

Run by `attribution.py` in an environment with captum, where neither Insitu nor anything of these
tests is installed: `python attributions_of_captum.py FOLDER`. Each folder in FOLDER holds a model
and `prompt/ids.safetensors`; beside that is put `attributions.safetensors`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerIntegratedGradients
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

warnings.simplefilter("ignore")
STEPS, ANSWER, INSTEAD, OTHER = 20, 3, 9, 11


def tell(folder: Path) -> None:
    ids = load_file(folder / "prompt" / "ids.safetensors")["ids"][:1]
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    embedding = module.get_input_embeddings()
    embeddings, other = (embedding(x).detach() for x in (ids, torch.full_like(ids, OTHER)))

    def of_ids(ids: torch.Tensor) -> torch.Tensor:
        logits = module(input_ids=ids, use_cache=False).logits[:, -1]
        return logits[:, ANSWER] - logits[:, INSTEAD]

    def of_embeddings(embeddings: torch.Tensor) -> torch.Tensor:
        logits = module(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        return logits[:, ANSWER] - logits[:, INSTEAD]

    zero, gap = IntegratedGradients(of_embeddings).attribute(
        embeddings, n_steps=STEPS, return_convergence_delta=True
    )
    found = {"zero": zero, "gap": gap}
    found["token"] = IntegratedGradients(of_embeddings).attribute(embeddings, other, n_steps=STEPS)
    found["layer"] = LayerIntegratedGradients(of_ids, embedding).attribute(
        ids, torch.full_like(ids, OTHER), n_steps=STEPS
    )
    found["gradient"] = InputXGradient(of_embeddings).attribute(embeddings)
    told = {
        name: (value if name == "gap" else value.sum(-1)[0]).detach().float().contiguous()
        for name, value in found.items()
    }
    save_file(told, folder / "attributions.safetensors")


if __name__ == "__main__":
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        tell(folder)
