"""Writes down what TransformerLens sees at its hooks, and what comes of writing to them.

Run by `agreement.py` in an environment with TransformerLens, where neither Insitu nor anything of
these tests is installed: `python hooks_of_transformer_lens.py FOLDER`. Each folder in FOLDER holds
a model; beside it are put `hooks.safetensors`, the value of each hook by name, and
`written.safetensors`, the logits after the third position at a hook was halved, by its name.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoConfig, AutoModelForCausalLM

warnings.simplefilter("ignore")
torch.set_grad_enabled(False)


def halve(value: torch.Tensor, hook: object) -> torch.Tensor:
    value = value.clone()
    value[:, 2] *= 0.5
    return value


def tell(folder: Path) -> None:
    ids = load_file(folder / "prompt" / "ids.safetensors")["ids"]
    config = AutoConfig.from_pretrained(folder)
    module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = build_bridge_from_module(module, config.architectures[0], hf_config=module.config)
    model.set_use_attn_result(True)
    logits, cache = model.run_with_cache(ids)
    found = {name: value for name, value in cache.items() if value.is_floating_point()}
    found["logits"] = logits
    save_file({k: v.contiguous().clone() for k, v in found.items()}, folder / "hooks.safetensors")
    written: dict[str, torch.Tensor] = {}
    for name, value in found.items():
        if value.ndim < 3 or value.shape[1] != ids.shape[1] or ".1." not in f".{name}":
            continue
        try:
            written[name] = model.run_with_hooks(ids, fwd_hooks=[(name, halve)]).contiguous()
        except Exception as error:
            print(f"{folder.name}: {name} cannot be written: {error}", file=sys.stderr)
    save_file(written, folder / "written.safetensors")


if __name__ == "__main__":
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        tell(folder)
