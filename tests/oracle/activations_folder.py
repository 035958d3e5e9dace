"""A folder of activations, and the model and the tokens that it comes from, for peers that train.

The values are those of plain PyTorch hooks, so what a peer makes of the folder is compared with
what it makes of the model itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import hooked_hidden
from tests.harvest.made_folders import dense, write_folder

LABEL = "residual_out:1"
CONTEXT = 32
SEQUENCES = 1024
WIDTH = 64


def write_training_folder(folder: Path) -> None:
    """Writes `model`, `tokens.safetensors` (`input_ids`) and `activations` into a folder.

    Args:
        folder: an empty folder.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=3, n_head=4, vocab_size=200, n_positions=CONTEXT,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module = GPT2LMHeadModel(config).eval()
    # With the weights that it is made with, all activations are alike.
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4 if "wte" in name else 0.15)
    module.save_pretrained(folder / "model")
    ids = torch.randint(0, 200, (SEQUENCES, CONTEXT))
    save_file({"input_ids": ids}, folder / "tokens.safetensors")
    hidden = [hooked_hidden(module, "transformer.h.1", some) for some in ids.split(64)]
    write_folder(
        folder / "activations",
        [[CONTEXT] * 128] * (SEQUENCES // 128),
        [dense(LABEL, (WIDTH,))],
        values={LABEL: torch.cat(hidden).flatten(0, 1)},
        token_ids=ids.flatten(),
        context=CONTEXT,
    )
