"""Which class weights belong to, told by the names of weights, without loading any."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def parameters_of(kind: Any, config: Any) -> set[str] | None:
    """Returns the names of a class's parameters; None if it cannot be made without weights.

    Names begin inside of the model that is under the head, as in the files of one without a head.

    Args:
        kind: a class of Transformers, or one of its auto classes.
        config: the config that it is made from.
    """
    make = getattr(kind, "from_config", None) or kind._from_config
    try:
        with torch.device("meta"):
            module: Any = make(copy.deepcopy(config))
    except Exception:  # it looks at its weights, or needs what is not installed
        return None
    inside = f"{module.base_model_prefix}."
    return {name.removeprefix(inside) for name, _ in module.named_parameters()}  # tied ones once


def fullest(classes: Sequence[Any], config: Any, place: str) -> Any:
    """Returns the class whose weights the files lack the fewest of, the first of equal ones.

    Args:
        classes: classes of Transformers, the likeliest first.
        config: the config that they are made from.
        place: the folder of the files. Of a repository, and where there are none, the first class
            is returned: a load names the missing weights.
    """
    there = _names_in(Path(place))
    if there is None:
        return classes[0]
    # A file has the names of the model that was saved, or those inside of its head.
    there |= {name.partition(".")[2] for name in there}

    def lacking(kind: Any) -> float:
        wanted = parameters_of(kind, config)
        if wanted is None:
            return float("inf")
        return len(wanted - there)

    return min(classes, key=lacking)


def _names_in(folder: Path) -> set[str] | None:
    """The names of the weights in a folder's files, None if it has no files of a known form."""
    try:
        for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (folder / index).exists():
                found = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                return set(found)
        file = folder / "model.safetensors"
        if file.exists():
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                return set(opened.keys())
        file = folder / "pytorch_model.bin"
        if file.exists():
            return set(torch.load(file, map_location="meta", weights_only=True))
    except Exception:  # it is broken: loading says so
        return None
    return None
