"""Files of sparse autoencoders as SAELens writes them, `cfg.json` and `sae_weights.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from insitu import disk
from insitu.graph.errors import LoadError, OptionError
from insitu.graph.location import here
from insitu.graph.user_warnings import warn_user
from insitu.methods.files import Tensors, read_tensors

_NEEDED = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
"""What there is of each architecture besides `W_enc`, `W_dec` and `b_dec`."""

_PROCESSING = (
    "center_writing_weights",
    "fold_ln",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
"""What TransformerLens does to weights, which changes activations."""

_NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
_SCALED = ("expected_average_only_in", True)
_LARGEST = 16 * 2**20
"""How many bytes a config may have."""

_ORIGIN = ("hook_name", "hook_point", "model_from_pretrained_kwargs")
"""Fields that are read from the metadata too."""

_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Kept(msgspec.Struct):
    """Options of an activation function."""

    k: _Count | None = None


class _Config(msgspec.Struct):
    """The fields of a config that define the computation, by SAELens's names.

    Before version 6 all of them stood on one level, and some had other names.
    """

    hook_name: str | None = None
    hook_point: str | None = None
    architecture: str = "standard"
    k: _Count | None = None
    activation_fn_str: str | None = None
    activation_fn: str | None = None
    activation_fn_kwargs: _Kept | None = None
    normalize_activations: str | bool | None = None
    apply_b_dec_to_input: bool = True
    dtype: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] = {}
    rescale_acts_by_decoder_norm: bool | None = None


def read(folder: str | os.PathLike[str], scale: float | None) -> dict[str, Any]:
    """Returns what a `SparseAutoencoder` is made of.

    Args:
        folder: the folder.
        scale: as of `SparseAutoencoder.load`.

    Raises:
        LoadError: if there is no such file, or one of a kind that is not known.
        OptionError: if the scale is no number above 0.
    """
    if scale is not None and not (isfinite(scale) and scale > 0):
        raise OptionError(f"`scale` is a number above 0, not {scale!r}.", here())
    try:
        told, config = _config(Path(folder) / "cfg.json")
        found, _ = read_tensors(Path(folder) / "sae_weights.safetensors")
        made = _made(told, config, found, scale)
    except LoadError as error:
        said = str(error).splitlines()[0]
        raise LoadError(
            f"{os.fspath(folder)!r} holds no sparse autoencoder of SAELens's that can be used: "
            f"{said}",
            here(),
        ) from None
    processed = [one for one in _PROCESSING if config.model_from_pretrained_kwargs.get(one) is True]
    if processed:
        warn_user(
            f"This sparse autoencoder was trained on a model that TransformerLens had processed: "
            f"{', '.join(processed)}. Activations of the model itself may be others, and so may "
            "features of them."
        )
    return made


def _config(path: Path) -> tuple[dict[str, Any], _Config]:
    """A config as it stands in its file, and its fields that are used."""
    try:
        # Not msgspec: SAELens writes with `json`, whose NaN and Infinity are no JSON.
        told = json.loads(disk.read(path, _LARGEST))
        own = msgspec.convert(told, dict[str, Any])
        nested = msgspec.convert(own.get("metadata") or {}, dict[str, Any])
        # All else there is the user's own notes: of another sparse autoencoder, for instance.
        origin = {name: nested[name] for name in _ORIGIN if name in nested}
        given = {name: one for name, one in {**own, **origin}.items() if one is not None}
        return own, msgspec.convert(given, _Config)
    except (ValueError, RecursionError) as error:  # msgspec's own is a `ValueError` too
        raise LoadError(f"its config is wrong: {error}") from None


def _made(
    told: dict[str, Any],
    config: _Config,
    found: dict[str, torch.Tensor],
    scale: float | None,
) -> dict[str, Any]:
    hook_name = config.hook_name or config.hook_point
    if not hook_name:
        raise LoadError("its config has no `hook_name`.")
    architecture, k = config.architecture, config.k
    activation = config.activation_fn_str or config.activation_fn or "relu"
    if activation == "topk":
        architecture = "topk"
        k = k or (config.activation_fn_kwargs or _Kept()).k
    if architecture not in _NEEDED:
        raise LoadError(
            f"the architecture {architecture!r} is not known, but {', '.join(_NEEDED)}."
        )
    normalisation = config.normalize_activations or "none"
    if normalisation not in (*_NORMALISATIONS, *_SCALED):
        raise LoadError(f"the normalisation {normalisation!r} is not known.")
    if activation not in ("relu", "topk"):
        raise LoadError(f"the activation function {activation!r} is not known.")
    weights = _weights(architecture, found)
    dtype = weights["W_enc"].dtype
    if config.dtype is not None:
        named = getattr(torch, config.dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise LoadError(f"the dtype {config.dtype!r} of weights is not known.")
        dtype = named
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if architecture == "topk" and not k:
        raise LoadError("its config does not say how many features are kept (`k`).")
    if k and k > len(weights["W_dec"]):
        raise LoadError(f"it keeps {k} features (`k`) of {len(weights['W_dec'])}.")
    scaled = normalisation in _SCALED
    if scaled and scale is None:
        raise LoadError(
            "it was trained on scaled activations, and the scale is not in its files: give what "
            "activations are multiplied with, `scale=`, or 1 if its weights have that already."
        )
    if scale is not None:
        weights["W_enc"] = weights["W_enc"] * scale
        weights["W_dec"] = weights["W_dec"] / scale
        weights["b_dec"] = weights["b_dec"] / scale
    return {
        "architecture": architecture,
        "weights": weights,
        "hook_name": hook_name,
        "centred": config.apply_b_dec_to_input,
        "normalisation": "none" if scaled else normalisation,
        "k": k or 0,
        "by_norm": architecture == "topk" and bool(config.rescale_acts_by_decoder_norm),
        "told": told,
    }


def _weights(architecture: str, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an architecture, with SAELens's older names replaced."""
    tensors = Tensors(found)
    weights = {"W_enc": tensors.take("W_enc", "width feature")}
    weights["W_dec"] = tensors.take("W_dec", "feature width")
    weights["b_dec"] = tensors.take("b_dec", "width")
    for name in _NEEDED[architecture]:
        if name == "threshold" and "log_threshold" in tensors:
            weights[name] = tensors.take("log_threshold", "feature").exp()
        else:
            weights[name] = tensors.take(name, "feature")
    left = tensors.rest("")
    scales = left.pop("scaling_factor", None)
    # For some versions SAELens wrote ones, which say nothing.
    if scales is not None and not bool((scales == 1).all()):
        raise LoadError("its features have scales of their own, which is not known.")
    if left:
        raise LoadError(f"a {architecture!r} one has no tensor {min(left)!r}, and this one does.")
    return weights
