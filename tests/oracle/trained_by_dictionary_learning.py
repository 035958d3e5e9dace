"""Trains a dictionary with dictionary_learning, from its own buffer and from a folder.

Run by `agreement_on_training.py` in an environment with dictionary_learning and Insitu, but none
of these tests: `python trained_by_dictionary_learning.py FOLDER`. It writes
`dictionary_learning.safetensors`, the loss of each step: "own", of activations that its buffer
takes from the model with nnsight; "folder", of `Activations.batches`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nnsight
import torch
from dictionary_learning import ActivationBuffer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.training import trainSAE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from insitu.harvest import Activations

warnings.simplefilter("ignore")
torch.set_num_threads(1)

SIZE, STEPS, CONTEXT = 256, 200, 32


class Told(StandardTrainer):
    """A trainer that keeps its losses."""

    def loss(self, x: torch.Tensor, step: int, logging: bool = False, **kwargs: Any) -> Any:
        if not logging:
            told.append(float(super().loss(x, step, logging=True).losses["mse_loss"]))
        return super().loss(x, step, logging=logging, **kwargs)


told: list[float] = []


def trained(data: Iterator[torch.Tensor], width: int) -> torch.Tensor:
    """The loss of each step of training on some data."""
    told.clear()
    config = {
        "trainer": Told,
        "steps": STEPS,
        "activation_dim": width,
        "dict_size": 4 * width,
        "layer": 1,
        "lm_name": "random",
        "lr": 1e-3,
        "l1_penalty": 0.01,
        "warmup_steps": 20,
        "sparsity_warmup_steps": None,
        "seed": 0,
        "device": "cpu",
    }
    trainSAE(data=data, trainer_configs=[config], steps=STEPS, device="cpu")
    return torch.tensor(told)


def buffer(folder: Path, ids: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Activations as its own buffer gives them: it reads texts, so token 17 is the word t17."""
    words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(200)}, "t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0")
    module = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = nnsight.LanguageModel(module, tokenizer=tokenizer)
    texts = (" ".join(f"t{n}" for n in row) for _ in range(99) for row in ids.tolist())
    return ActivationBuffer(
        texts,
        model,
        model.transformer.h[1],
        d_submodule=width,
        n_ctxs=256,
        ctx_len=CONTEXT,
        refresh_batch_size=32,
        out_batch_size=SIZE,
        device="cpu",
    )


def main(folder: Path) -> None:
    ids = load_file(folder / "tokens.safetensors")["input_ids"]
    activations = Activations.open(folder / "activations")
    (site,) = activations.sites
    (width,) = activations.shape(site)
    losses = {
        "folder": trained(activations.batches(SIZE).vectors(device="cpu"), width),
        "own": trained(buffer(folder, ids, width), width),
    }
    save_file(losses, folder / "dictionary_learning.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
