"""The block contract: what `.output` of a transformer block is, with any return value.

Blocks of some families and versions return a tensor, others a tuple with various things behind
the hidden states. Here it is always a tuple: the hidden states, and with a key-value cache on,
the layer's `(key, value)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

from insitu.graph.writing import fitted

CACHES = frozenset(
    ["transformers.cache_utils", "accelerate.utils.modeling", "accelerate.utils.operations"]
)
"""The Python modules whose calls of torch are no part of a forward: caches of keys and values are
written in them, and what moves offloaded weights and arguments to where they are used."""


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
        hidden = output if isinstance(output, torch.Tensor) else output[_hidden_at(output)]
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
        if isinstance(output, torch.Tensor):
            return shown[0]
        at = _hidden_at(output)
        return (*output[:at], shown[0], *output[at + 1 :])

    def returns_more(self, returned: Any) -> bool:
        """Returns whether only a run of the block makes all that it returns.

        Args:
            returned: what it returns, as fake tensors; what it only hands on is no fake.
        """
        if isinstance(returned, torch.Tensor):
            return False
        return any(isinstance(item, FakeTensor) for item in returned[1:])

    def stand_in(self, returned: Any, shown: Any) -> Any:
        """Returns what the block must return for hidden states that it did not make.

        Raises:
            ShapeError: if the hidden states are of another shape.
        """
        whole = isinstance(returned, torch.Tensor)
        hidden = fitted(returned if whole else returned[0], shown[0], block=False, move=False)
        return hidden if whole else (hidden, *returned[1:])


def _hidden_at(output: Any) -> int:
    """Where hidden states stand in what a block returns.

    They come first, but a block that is asked for its attention may put that in front of them.
    """
    if len(output) > 1 and isinstance(output[0], torch.Tensor) and output[0].ndim == 4:
        places = (at for at, item in enumerate(output) if getattr(item, "ndim", None) == 3)
        return next(places, 0)
    return 0


def block_views(
    module: nn.Module, config: Any, cached: bool, known: Collection[str] = ()
) -> dict[str, BlockView]:
    """Returns the view of each transformer block of a model, by path.

    Args:
        module: the model.
        config: its config, which may hold others: of a decoder, of what looks at images.
        cached: whether it is run with a key-value cache.
        known: as of `find_stacks`.
    """
    views: dict[str, BlockView] = {}
    for stack in find_stacks(module, config, known):
        blocks: Any = module.get_submodule(stack)
        for layer, place in enumerate(_places(blocks)):
            views[f"{stack}.{layer}"] = BlockView(place, cached)
    return views


def _places(blocks: Sequence[nn.Module]) -> Sequence[int]:
    """Where each block has its keys and values in the cache.

    Its attention says so, and goes on to say the same when the block is moved.
    """
    told = [
        next(
            (vars(part)["layer_idx"] for part in block.modules() if "layer_idx" in vars(part)), None
        )
        for block in blocks
    ]
    places = [place for place in told if isinstance(place, int)]
    return places if len(set(places)) == len(blocks) else range(len(blocks))


def find_stacks(module: nn.Module, config: Any, known: Collection[str] = ()) -> dict[str, int]:
    """Returns the lists of transformer blocks of a model, by path, with their lengths.

    They are found by structure: lists as long as some part of the model is deep, of modules that
    are made of modules which have parts themselves, such as attention. What lies inside a block
    is none.

    Args:
        module: the model.
        config: its config.
        known: the paths of lists that were found before: they are it still, if they have been
            made shorter or longer since.
    """
    depths = _depths(config)
    found: dict[str, int] = {}
    for path, part in module.named_modules():
        if not isinstance(part, nn.ModuleList) or not len(part):
            continue
        if path not in known and len(part) not in depths:
            continue
        nested = any(path.startswith(f"{stack}.") for stack in found)
        blocks = sum(map(_has_composite_parts, part))
        # A user may have put something else in the place of some blocks, such as `nn.Identity`.
        if not nested and blocks * 2 > len(part):
            found[path] = len(part)
    return found


# Where configs say how deep a model is, or its parts are.
_DEPTHS = (
    *("num_hidden_layers", "num_layers", "num_encoder_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers", "n_layer", "n_layers", "depth", "num_blocks"),
    *("num_layers_per_stack", "num_global_layers"),
)


def _depths(config: Any) -> set[int]:
    """How deep a config says that a model and its parts are.

    What has `depths` is made of stages of different width: they are shown as they are.
    """
    found: set[int] = set()
    if not hasattr(config, "depths"):
        sizes = [getattr(config, name, None) for name in _DEPTHS]
        found.update(size for size in sizes if isinstance(size, int) and size > 0)
    for part in vars(config).values():
        if hasattr(part, "get_text_config"):
            found |= _depths(part)
    return found


def _has_composite_parts(block: nn.Module) -> bool:
    return any(part._modules for part in block.children())


def _keys_and_values(arguments: tuple[Any, ...], layer: int) -> tuple[Any, Any] | None:
    """One layer's keys and values, from the cache among a block's arguments.

    A layer without attention has none, though the model has a cache.
    """
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            continue
        cache = getattr(argument, "self_attention_cache", argument)
        layers = getattr(cache, "layers", None)
        if isinstance(layers, list):
            held = layers[layer] if layer < len(layers) else None
            return _pair(getattr(held, "keys", None), getattr(held, "values", None))
        # Transformers 4 has others for models with layers of several kinds.
        keys, values = (getattr(cache, name, None) for name in ("key_cache", "value_cache"))
        if isinstance(keys, list) and isinstance(values, list) and layer < len(keys):
            return _pair(keys[layer], values[layer])
    return None


def _pair(keys: Any, values: Any) -> tuple[Any, Any] | None:
    found = isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
    return (keys, values) if found and keys.ndim == 4 else None
