"""What a module that is called as a function may return: values in memory of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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


def pulled_back(module: nn.Module, value: Tensor, gradients: Tensor) -> Tensor:
    """Returns gradients at what a module is given, for gradients at what it gives.

    Args:
        module: the module, which does the same to each row.
        value: what it is given, a row.
        gradients: those at what it makes of that, a row each.
    """
    with torch.inference_mode(False), torch.enable_grad():
        given = value.detach().expand_as(gradients).requires_grad_()
        made = module(given)
    return torch.autograd.grad(made, given, gradients)[0]


def _tensors_in(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes, of it and of its submodules."""
    for part in module.modules():
        own = vars(part)
        for held in (own["_parameters"], own["_buffers"], own):
            for value in held.values():
                if isinstance(value, Tensor):
                    yield value
