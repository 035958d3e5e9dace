"""The user's own tensors in a block that require gradients: leaves of the graph of autograd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any, cast

import torch
from torch import nn

from insitu.engine.plan import Gradients
from insitu.graph.autograd_history import computed_of, steps_of
from insitu.graph.errors import WireError
from insitu.graph.node import Function, Graph, Ref, Subgraph, WeightRef
from insitu.graph.operations import BACKWARD


def leaves_of(
    graph: Graph, gradients: Gradients, requests: object, model: nn.Module
) -> list[torch.Tensor]:
    """Returns the user's own tensors that want a gradient, and none of the model's parameters.

    Of a constant that the user has computed, such as the weight of a parametrised layer, it is
    what it was computed of.

    Args:
        graph: the recorded experiment, with its constants.
        gradients: which of its nodes have such tensors among their constants, once that is known.
        requests: what the model is called with.
        model: the wrapped module.
    """
    found: dict[int, torch.Tensor] = {}
    if gradients.constants is None:
        rows = range(len(graph))
        gradients.constants = [index for index in rows if _constants_of(graph, index)]
    for index in gradients.constants:
        found |= _constants_of(graph, index)
    _search(requests, found)
    for tensor in [tensor for tensor in found.values() if not tensor.is_leaf]:
        del found[id(tensor)]
        found |= computed_of(tensor)
    if found:
        for parameter in model.parameters():
            found.pop(id(parameter), None)
    return list(found.values())


def has_leaves(graph: Graph, requests: object) -> bool:
    """Returns whether tensors of the user's, or weights of the model, may get gradients in a block.

    Args:
        graph: the recorded experiment, with its constants.
        requests: what the model is called with.
    """
    found: dict[int, torch.Tensor] = {}
    _search(requests, found)
    return bool(found) or any(_constants_of(graph, index) for index in range(len(graph)))


def check_named(graph: Graph, trained: Sequence[torch.Tensor]) -> None:
    """Checks that another process can give the gradients of the tensors that `inputs=` names.

    Each tensor is a leaf there: what was computed before the block is not known to depend on
    another one. So a gradient would lack a part, or would be accumulated in another tensor.

    Args:
        graph: the recorded experiment, with its constants.
        trained: the tensors of its job that require a gradient.

    Raises:
        WireError: if it cannot, at the line of the backward pass.
    """
    for index, (operation, _, kwargs, *_) in enumerate(graph.rows):
        named = kwargs.get("inputs") if operation is BACKWARD else None
        for tensor in named or ():
            if not isinstance(tensor, torch.Tensor):
                continue
            others = [other for other in trained if other is not tensor and not other.is_leaf]
            if tensor.is_leaf:
                apart = id(tensor) not in computed_of(*others)
            else:
                apart = tensor.grad_fn not in steps_of(others)
                apart = apart and not kwargs.get("accumulate", True)
            if not apart:
                raise WireError(
                    "The backward pass cannot be sent to another process: a tensor of `inputs=` "
                    "has a history for autograd, or another tensor was computed of it before the "
                    "block, and that history stays here. Compute these tensors in the block.",
                    graph[index].location,
                )


def _constants_of(graph: Graph, index: int) -> dict[int, torch.Tensor]:
    """What requires a gradient among the constants of a node, by identity."""
    found: dict[int, torch.Tensor] = {}
    _, args, kwargs, *_ = graph.rows[index]
    for arg in (*args, *kwargs.values()):
        _search(arg, found)
    return found


def _search(value: Any, found: dict[int, torch.Tensor]) -> None:
    """Adds the tensors in a value that require a gradient to what was found, by identity."""
    if type(value) in _NO_LEAVES:
        return
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            found[id(value)] = value
    elif isinstance(value, _SEQUENCES):
        for item in cast("list[Any]", value):
            _search(item, found)
    elif isinstance(value, _MAPPINGS):
        for item in cast("Mapping[Any, Any]", value).values():
            _search(item, found)
    elif isinstance(value, Subgraph):
        for index in range(len(value.graph)):
            found |= _constants_of(value.graph, index)
        _search(value.output, found)
    elif isinstance(value, Function):
        _search(value.function, found)
    elif isinstance(value, nn.Module):
        for parameter in value.parameters():
            _search(parameter, found)


# Made once; and a dictionary is known for one without a look at the abstract class.
_SEQUENCES, _MAPPINGS = (tuple, list), (dict, Mapping)
_NO_LEAVES = frozenset(
    [Ref, WeightRef, int, float, bool, str, slice, type(None), type(Ellipsis), CodeType]
)
