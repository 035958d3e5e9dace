"""Sparse autoencoders: dictionaries of features that activations are sums of.

Read from the files that SAELens writes, and computed here. Bricken et al. 2023
(https://transformer-circuits.pub/2023/monosemantic-features), Cunningham et al. 2023
(https://arxiv.org/abs/2309.08600); gated, Rajamanoharan et al. 2024a
(https://arxiv.org/abs/2404.16014); JumpReLU, 2024b (https://arxiv.org/abs/2407.14435); top-k, Gao
et al. 2024 (https://arxiv.org/abs/2406.04093).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from insitu.graph.errors import ShapeError
from insitu.graph.location import here

if TYPE_CHECKING:
    from typing import Self

_EPSILON = 1e-5  # beside a standard deviation, as SAELens has it


@dataclass(frozen=True, slots=True, eq=False)
class SparseAutoencoder:
    """A sparse autoencoder.

    All methods take tensors and, in an open block, proxies.

    Attributes:
        architecture: "standard", "jumprelu", "topk" or "gated".
        weights: its tensors by SAELens's names: `W_enc` `(width, feature)`, `W_dec` `(feature,
            width)`, `b_dec` `(width,)`, and by architecture `b_enc`, `threshold`, `b_gate`, `b_mag`
            and `r_mag`, `(feature,)`.
        hook_name: where it belongs, by TransformerLens's name, such as "blocks.8.hook_resid_pre".
        centred: whether `b_dec` is subtracted before encoding.
        normalisation: how activations are scaled before, and scaled back behind: "none",
            "constant_norm_rescale" or "layer_norm".
        k: of "topk", how many features are kept.
        by_norm: of "topk", whether features are measured by the lengths of their directions.
        told: all of its config, as it stands in the file.
    """

    architecture: str
    weights: Mapping[str, torch.Tensor]
    hook_name: str
    centred: bool
    normalisation: str
    k: int
    by_norm: bool
    told: Mapping[str, Any]

    def __repr__(self) -> str:
        size = f"{self.n_features} features of width {self.width}"
        return f"<Sparse autoencoder of {self.hook_name}: {self.architecture}, {size}>"

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, scale: float | None = None) -> Self:
        """Returns a sparse autoencoder from a folder of SAELens's: a config and weights.

        Warns of one that was trained on a model whose weights TransformerLens had processed.

        Args:
            folder: where `cfg.json` and `sae_weights.safetensors` are.
            scale: what activations are multiplied with before they are encoded, for one that was
                trained on scaled activations and saved without that folded into its weights.

        Raises:
            LoadError: if there is no such file, or one of a kind that is not known.
            OptionError: if the scale is no number above 0.
        """
        from insitu.methods.sae_files import read

        return cls(**read(folder, scale))

    @property
    def width(self) -> int:
        """The size of the activations."""
        return self.weights["W_dec"].shape[1]

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return self.weights["W_dec"].shape[0]

    def direction(self, feature: int) -> torch.Tensor:
        """Returns what a feature of size 1 adds to an activation, `(width,)`."""
        return self.weights["W_dec"][feature]

    def to(self, device: str | torch.device) -> SparseAutoencoder:
        """Returns it on a device."""
        return replace(self, weights={name: w.to(device) for name, w in self.weights.items()})

    def encode(self, activations: Any) -> Any:
        """Returns the features of activations.

        Args:
            activations: `(..., width)`.

        Returns:
            `(..., feature)`, in the dtype of the weights.

        Raises:
            ShapeError: if activations have another width.
        """
        w = self.weights
        if isinstance(activations, torch.Tensor) and activations.shape[-1] != self.width:
            raise ShapeError(
                f"Activations of shape {tuple(activations.shape)} are not of width {self.width}.",
                here(),
            )
        x, scale, shift = self._normalised(activations.to(w["W_enc"].dtype))
        del scale, shift
        x = x - w["b_dec"] if self.centred else x
        pre = x @ w["W_enc"]
        if self.architecture == "gated":
            sizes = (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
            return sizes * (pre + w["b_gate"] > 0)
        pre = pre + w["b_enc"]
        if self.architecture == "jumprelu":
            return pre.relu() * (pre > w["threshold"])
        if self.architecture == "topk":
            pre = pre * w["W_dec"].norm(dim=-1) if self.by_norm else pre
            largest = pre.topk(self.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, largest.indices, largest.values.relu())
        return pre.relu()

    def decode(self, features: Any, like: Any) -> Any:
        """Returns activations from features.

        Args:
            features: `(..., feature)`.
            like: the activations that were encoded, `(..., width)`: what was normalised is given
                back their size.

        Returns:
            `(..., width)`, in the dtype of the weights.
        """
        w = self.weights
        if self.by_norm:
            features = features / w["W_dec"].norm(dim=-1)
        made = features @ w["W_dec"] + w["b_dec"]
        if self.normalisation == "none":
            return made
        _, scale, shift = self._normalised(like.to(w["W_enc"].dtype))
        return made * scale + shift

    def _normalised(self, x: Any) -> tuple[Any, Any, Any]:
        """Activations as they are encoded, and what to multiply with and add to undo it."""
        if self.normalisation == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / self.width**0.5
            return x / size, size, 0.0
        if self.normalisation == "layer_norm":
            mean = x.mean(dim=-1, keepdim=True)
            deviation = (x - mean).std(dim=-1, keepdim=True)
            return (x - mean) / (deviation + _EPSILON), deviation, mean
        return x, 1.0, 0.0
