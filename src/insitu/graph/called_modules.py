"""What a module that is called as a function may return: values in memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from insitu.graph.structure import map_structure, storage_of, tensors_of


def apart_from_weights(module: nn.Module, result: Any) -> Any:
    """Returns what a module has returned, with copies in the place of its own tensors.

    Learned positions and cached tables are returned as they are, or as views. Whoever writes into
    such a value later, as the model may, would write into the module.

    Args:
        module: the module.
        result: what it has returned.
    """
    found = tensors_of(result)
    if not found:
        return result
    own = {storage_of(tensor) for tensor in _tensors_in(module)}
    if not any(storage_of(tensor) in own for tensor in found):
        return result

    def leaf(item: Any) -> Any:
        shares = isinstance(item, Tensor) and storage_of(item) in own
        return item.clone() if shares else item

    return map_structure(leaf, result)


def _tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes, of it and of what is in it."""
    for part in module.modules():
        own = vars(part)
        for held in (own["_parameters"], own["_buffers"], own):
            for value in held.values():
                if isinstance(value, Tensor):
                    yield value
