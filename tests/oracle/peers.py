"""How peers are asked: each in an environment of its own, by a script that writes files.

They are run by `make oracle`, which says in which environment each is; none is part of the suite.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel


def write_models(folder: Path, models: Mapping[str, PreTrainedModel], ids: torch.Tensor) -> None:
    """Writes a folder for each model, with a prompt of these ids in it."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (folder / name / "prompt").mkdir()
        save_file({"ids": ids}, folder / name / "prompt" / "ids.safetensors")


def ask(variable: str, script: str, folder: Path) -> None:
    """Lets a peer write beside what is in a folder what it makes of it.

    Args:
        variable: the environment variable that holds the peer's Python.
        script: the name of the script in this folder.
        folder: what the script is given.
    """
    path = Path(__file__).with_name(script)
    subprocess.run([os.environ[variable], path, folder], check=True)
