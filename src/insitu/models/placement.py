"""Where token ids have to be to run through a model: on the device of its input embedding."""

from __future__ import annotations

from typing import Any

import torch

from insitu.graph.structure import map_structure
from insitu.models.estimates import weight_of


class Placement:
    """Where the input of a language model has to be.

    Args:
        embedding: the model's input embedding.
        loaded: whether the weights are in memory.
    """

    def __init__(self, embedding: Any, loaded: bool) -> None:
        self._embedding = embedding
        self._loaded = loaded

    @property
    def device(self) -> torch.device:
        """The embedding's device as it is now, "meta" before the weights are there."""
        weight = self._embedding._parameters.get("weight")  # `__getattr__` takes a microsecond
        if weight is None:
            weight = weight_of(self._embedding)
        if weight.is_meta and self._loaded:  # Accelerate keeps the weights elsewhere
            hook = getattr(self._embedding, "_hf_hook", None)
            return torch.device(getattr(hook, "execution_device", None) or "cpu")
        return weight.device

    def has(self, ids: torch.Tensor) -> bool:
        """Returns whether token ids are on that device, as far as that is seen at once.

        Args:
            ids: the token ids.
        """
        weight = self._embedding._parameters.get("weight")
        if weight is None:
            return False
        # To ask for a device makes an object of Python's.
        return (weight.is_cpu and ids.is_cpu) or weight.device == ids.device

    def moved(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns keyword arguments with their tensors on that device.

        To be called by the thread whose turn it is to run the model.
        """
        device = self.device

        def leaf(item: Any) -> Any:
            return item.to(device) if isinstance(item, torch.Tensor) else item

        return map_structure(leaf, kwargs)
