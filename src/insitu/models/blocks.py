"""The block contract: what `.output` of a transformer block is, whatever the block returns.

Blocks of some families and versions return a tensor, others a tuple with various things behind
the hidden states. Here it is always a tuple: the hidden states, and with a key-value cache on,
the layer's `(key, value)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from insitu.graph.errors import ShapeError
from insitu.graph.writing import fitted


@dataclass(frozen=True, slots=True)
class BlockView:
    """Shows the output of a block by the contract.

    Attributes:
        layer: the block's place among the blocks, which is its place in the cache.
        takes_arguments: whether there is a cache, to be found among the block's arguments.
    """

    layer: int
    takes_arguments: bool

    def __call__(self, output: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Returns `(hidden states,)` or `(hidden states, (key, value))`.

        Hidden states are `(batch, position, d_model)`, keys and values
        `(batch, head, position, d_head)`.
        """
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if not self.takes_arguments:
            return (hidden,)
        cached = _keys_and_values((*args, *kwargs.values()), self.layer)
        return (hidden,) if cached is None else (hidden, cached)

    def restore(
        self, output: Any, shown: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Returns what the block must return, and puts keys and values into the cache."""
        if len(shown) > 1:
            cached = _keys_and_values((*args, *kwargs.values()), self.layer)
            for old, new in zip(cached or (), shown[1], strict=False):
                if new is not old:
                    old.copy_(new)
        return shown[0] if isinstance(output, torch.Tensor) else (shown[0], *output[1:])

    def stand_in(self, returned: Any, shown: Any) -> Any:
        """Returns what the block must return for hidden states that it did not make.

        Raises:
            ShapeError: if the hidden states are of another shape, or it returns more than them.
        """
        whole = isinstance(returned, torch.Tensor)
        hidden = fitted(returned if whole else returned[0], shown[0], block=False, move=False)
        if whole:
            return hidden
        if any(isinstance(item, torch.Tensor) for item in returned[1:]):
            raise ShapeError("the block returns more than hidden states with these options")
        return (hidden, *returned[1:])


def block_views(module: nn.Module, layers: int | None, cached: bool) -> dict[str, BlockView]:
    """Returns the view of each transformer block of a model, by path.

    Blocks are found by structure: the first list of modules of one class that is as long as the
    model is deep.

    Args:
        module: the model.
        layers: how many blocks its config says it has.
        cached: whether it is run with a key-value cache.
    """
    for path, part in module.named_modules():
        blocks = list(part) if isinstance(part, nn.ModuleList) else []
        if len(blocks) == layers and len({type(block) for block in blocks}) == 1:
            return {f"{path}.{layer}": BlockView(layer, cached) for layer in range(len(blocks))}
    return {}


def _keys_and_values(arguments: tuple[Any, ...], layer: int) -> tuple[Any, Any] | None:
    """One layer's keys and values, from the cache among a block's arguments."""
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            continue
        cache = getattr(argument, "self_attention_cache", argument)
        layers = getattr(cache, "layers", None)
        if isinstance(layers, list) and layer < len(layers):
            keys = getattr(layers[layer], "keys", None)
            values = getattr(layers[layer], "values", None)
            return None if keys is None or values is None else (keys, values)
    return None
