"""Whether a model computes the same with other options, such as another kind of attention.

It is run with both, so that its weights have to be there. What the options are for is no concern
of this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from insitu.engine.fallback import Fallback, tried
from insitu.engine.probe import Call
from insitu.graph.structure import tensors_of
from insitu.models.attention import OPTION, attending

if TYPE_CHECKING:
    from insitu.models.model import Model


def agree(model: Model, call: Call | None, options: Mapping[str, Any]) -> bool:
    """Returns whether a model computes with some options what it does without, to rounding.

    Args:
        model: the model, with its weights.
        call: what it is called with; None if that is not known, and then it is not known to agree.
        options: keyword arguments of the forward, or which implementation of attention.
    """
    if call is None:
        return False
    return _alike(_computed(model, call, {}), _computed(model, call, options))


def _computed(model: Model, call: Call, options: Mapping[str, Any]) -> torch.Tensor | None:
    """What a model returns for a call, None if it cannot run so."""
    kwargs = {**call.kwargs, **options}
    implementation = kwargs.pop(OPTION, None)
    with model.in_use(), attending(model.module, implementation), torch.no_grad():
        returned = tried(lambda: tensors_of(model.module(**kwargs)), "another implementation")
    if isinstance(returned, Fallback):
        return None
    return next((tensor for tensor in returned if tensor.is_floating_point()), None)


def _alike(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Whether two implementations of the same may have made two tensors."""
    if first is None or second is None or first.shape != second.shape:
        return False
    scale = float(first.double().norm())
    limit = max(1e-3, 3 * torch.finfo(first.dtype).eps)  # of what is rounded many times on the way
    return float((first.double() - second.double()).norm()) <= limit * max(scale, 1e-3)
