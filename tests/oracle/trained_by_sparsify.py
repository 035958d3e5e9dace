"""Trains a sparse coder with eai-sparsify, from the model and from a folder of activations.

Run by `agreement_on_training.py` in an environment with eai-sparsify and Insitu, but none of these
tests: `python trained_by_sparsify.py FOLDER`. It writes `sparsify.safetensors`, the unexplained
variance at each step: "own", of a model that runs; "folder", of a module in its place that looks
rows up.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sparsify import SaeConfig, TrainConfig, Trainer
from sparsify.sparse_coder import SparseCoder
from torch import nn
from transformers import AutoModelForCausalLM

from insitu.harvest import Activations

warnings.simplefilter("ignore")
torch.set_num_threads(1)

SIZE, STEPS, CONTEXT = 256, 200, 32

told: list[float] = []


def main(folder: Path) -> None:
    ids = load_file(folder / "tokens.safetensors")["input_ids"]
    module = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    activations = Activations.open(folder / "activations")
    losses = {
        "own": trained(module, ids.repeat(2, 1), "h.1"),
        "folder": trained(
            FolderModel(activations, activations.sites[0]), row_numbers(len(activations)), "site"
        ),
    }
    save_file(losses, folder / "sparsify.safetensors")


class FolderModel(nn.Module):
    """Stands for a model: what it is given are numbers of rows, and it looks them up."""

    def __init__(self, activations: Activations, site: str) -> None:
        super().__init__()
        self.rows = activations[site]
        self.site = nn.Identity()
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.site(self.rows[input_ids.flatten()].view(*input_ids.shape, -1))


def row_numbers(rows: int) -> torch.Tensor:
    """Numbers of rows in a random order, as if they were sequences."""
    torch.manual_seed(0)
    order = torch.cat([torch.randperm(rows), torch.randperm(rows)])
    return order.view(-1, CONTEXT)


def trained(model: Any, ids: torch.Tensor, hookpoint: str) -> torch.Tensor:
    """The unexplained variance of each step of training."""
    told.clear()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SaeConfig(expansion_factor=4, k=16),
            batch_size=SIZE // CONTEXT,
            optimizer="adam",
            lr=1e-3,
            lr_warmup_steps=20,
            hookpoints=[hookpoint],
            log_to_wandb=False,
            save_dir=folder,
            run_name="told",
        )
        data = Dataset.from_dict({"input_ids": ids[: STEPS * SIZE // CONTEXT]})
        Trainer(config, data.with_format("torch"), model).fit()
    return torch.tensor(told)


forward = SparseCoder.forward


def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
    output = forward(self, *args, **kwargs)
    told.append(float(output.fvu))
    return output


SparseCoder.forward = telling  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
