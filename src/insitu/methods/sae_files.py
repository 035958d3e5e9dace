"""Files of sparse autoencoders as SAELens writes them, `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from insitu.graph.errors import LoadError
from insitu.graph.location import here

_NEEDED = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""What there is of each architecture besides `W_enc`, `W_dec` and `b_dec`."""

_NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")


def read(folder: str | os.PathLike[str], scale: float | None) -> dict[str, Any]:
    """Returns what a `SparseAutoencoder` is made of.

    Args:
        folder: the folder.
        scale: as of `SparseAutoencoder.load`.

    Raises:
        LoadError: if there is no such file, or one of a kind that is not known.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        told = json.loads((folder / "cfg.json").read_text())
        weights = load_file(folder / "sae_weights.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadError(
            f"{os.fspath(folder)!r} holds no sparse autoencoder of SAELens's: {error}", here()
        ) from None
    # Before version 6 everything stood on one level, and some of it had other names.
    flat = {**told, **told.get("metadata", {})}
    hook_name = flat.get("hook_name", flat.get("hook_point"))
    if not hook_name:
        raise LoadError(f"The config in {os.fspath(folder)!r} has no `hook_name`.", here())
    architecture, k = flat.get("architecture", "standard"), flat.get("k")
    if flat.get("activation_fn_str", flat.get("activation_fn")) == "topk":
        architecture = "topk"
        k = k or (flat.get("activation_fn_kwargs") or {}).get("k")
    if "log_threshold" in weights:
        weights["threshold"] = weights.pop("log_threshold").exp()
    _check(architecture, flat, weights, k)
    scaled = flat.get("normalize_activations") in ("expected_average_only_in", True)
    if scaled and scale is None:
        raise LoadError(
            "It was trained on scaled activations, and the scale is not in its files: give what "
            "activations are multiplied with, `scale=`, or 1 if its weights have that already.",
            here(),
        )
    if scale is not None:
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"] = weights["W_dec"] / scale
        weights["b_dec"] = weights["b_dec"] / scale
    normalisation = "none" if scaled else (flat.get("normalize_activations") or "none")
    return {
        "architecture": architecture,
        "weights": weights,
        "hook_name": hook_name,
        "centred": bool(flat.get("apply_b_dec_to_input", True)),
        "normalisation": normalisation,
        "k": int(k or 0),
        "by_norm": architecture == "topk" and bool(flat.get("rescale_acts_by_decoder_norm")),
        "told": told,
    }


def _check(
    architecture: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], k: Any
) -> None:
    """Raises if something is not known, or missing.

    Raises:
        LoadError: in that case.
    """
    if architecture not in _NEEDED:
        raise LoadError(
            f"The architecture {architecture!r} is not known, but {', '.join(_NEEDED)}.", here()
        )
    normalisation = config.get("normalize_activations") or "none"
    if normalisation not in (*_NORMALISATIONS, "expected_average_only_in", True):
        raise LoadError(f"The normalisation {normalisation!r} is not known.", here())
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation not in ("relu", "topk"):
        raise LoadError(f"The activation function {activation!r} is not known.", here())
    lacking = [n for n in ("W_enc", "W_dec", "b_dec", *_NEEDED[architecture]) if n not in weights]
    if lacking:
        raise LoadError(f"Its file has no {', '.join(lacking)}.", here())
    if config.get("finetuning_scaling_factor") or "scaling_factor" in weights:
        raise LoadError("Its features have scales of their own, which is not known.", here())
    if architecture == "topk" and not k:
        raise LoadError("Its config does not say how many features are kept (`k`).", here())
