"""Trains a sparse autoencoder with SAELens, from its own store and from a folder of activations.

Run by `agreement_on_training.py` in an environment with SAELens and Insitu, but none of these
tests: `python trained_by_sae_lens.py FOLDER`. It writes `sae_lens.safetensors`, the loss of each
step: "own", of activations that its store takes from the model; "folder", of
`Activations.batches`; and "arrow", of its store on the data set that `to_arrow` writes.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LoggingConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import AutoModelForCausalLM

from insitu.harvest import Activations

warnings.simplefilter("ignore")

torch.set_num_threads(1)
SIZE, STEPS = 256, 200


class Told(SAETrainer[Any, Any]):
    """A trainer that keeps its losses."""

    def step(self, batch: torch.Tensor) -> Any:
        output = super().step(batch)
        told.append(float(output.losses["mse_loss"]))
        return output


told: list[float] = []


def trained(data: Iterator[torch.Tensor], width: int) -> torch.Tensor:
    """The loss of each step of training on some data."""
    torch.manual_seed(0)
    told.clear()
    sae = StandardTrainingSAE(
        StandardTrainingSAEConfig(d_in=width, d_sae=4 * width, l1_coefficient=0.01)
    )
    config = SAETrainerConfig(
        total_training_samples=SIZE * STEPS,
        train_batch_size_samples=SIZE,
        lr=1e-3,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    Told(config, sae, data).fit()
    return torch.tensor(told)


def store(model: Any, width: int, **options: Any) -> Iterator[torch.Tensor]:
    """Activations as SAELens's own store gives them."""
    return ActivationsStore(
        model=model,
        hook_name="blocks.1.hook_resid_post",
        hook_head_index=None,
        streaming=False,
        context_size=32,
        d_in=width,
        n_batches_in_buffer=16,
        total_training_tokens=SIZE * STEPS,
        store_batch_size_prompts=16,
        train_batch_size_tokens=SIZE,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        **options,
    )


def main(folder: Path) -> None:
    ids = load_file(folder / "tokens.safetensors")["input_ids"]
    module = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    model = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config)
    activations = Activations.open(folder / "activations")
    (site,) = activations.sites
    (width,) = activations.shape(site)
    activations.to_arrow(folder / "arrow", site)
    losses = {
        "own": trained(store(model, width, dataset=Dataset.from_dict({"tokens": ids})), width),
        "folder": trained(activations.batches(SIZE).vectors(), width),
        "arrow": trained(
            store(model, width, dataset=None, cached_activations_path=str(folder / "arrow")), width
        ),
    }
    save_file(losses, folder / "sae_lens.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
