"""What a wrapper does as its module does: `model.to("cuda")`, `model.eval()`, `model.parameters()`.

What needs the weights loads them first, so that it holds for what runs later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from torch import nn

    from insitu.models.wrapped_module import WrappedModule

_CHANGING = frozenset(
    [
        *("to", "cuda", "cpu", "half", "float", "double", "bfloat16", "eval", "train"),
        *("requires_grad_", "zero_grad"),
    ]
)
_READING = frozenset(
    [
        *("parameters", "named_parameters", "buffers", "named_buffers", "state_dict"),
        *("named_modules", "named_children", "children", "get_submodule", "get_parameter"),
        *("load_state_dict",),
    ]
)
_ASKED = frozenset(["dtype", "device"])
DELEGATED = _CHANGING | _READING | _ASKED

if TYPE_CHECKING:

    class ActsAsModule:
        """What type checkers know of that: it is done by `Model.__getattr__`."""

        @property
        def dtype(self) -> torch.dtype: ...
        @property
        def device(self) -> torch.device: ...

        # What changes the module in place gives the wrapper.
        def to(self, *args: Any, **kwargs: Any) -> Self: ...
        def cuda(self, device: int | torch.device | None = None) -> Self: ...
        def cpu(self) -> Self: ...
        def half(self) -> Self: ...
        def float(self) -> Self: ...
        def double(self) -> Self: ...
        def bfloat16(self) -> Self: ...
        def eval(self) -> Self: ...
        def train(self, mode: bool = True) -> Self: ...
        def requires_grad_(self, requires_grad: bool = True) -> Self: ...
        def zero_grad(self, set_to_none: bool = True) -> Self: ...
        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...
        def named_parameters(
            self, *args: Any, **kwargs: Any
        ) -> Iterator[tuple[str, nn.Parameter]]: ...
        def buffers(self, recurse: bool = True) -> Iterator[torch.Tensor]: ...
        def named_buffers(
            self, *args: Any, **kwargs: Any
        ) -> Iterator[tuple[str, torch.Tensor]]: ...
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]: ...
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any: ...
        def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]: ...
        def named_children(self) -> Iterator[tuple[str, nn.Module]]: ...
        def children(self) -> Iterator[nn.Module]: ...
        def get_submodule(self, target: str) -> nn.Module: ...
        def get_parameter(self, target: str) -> nn.Parameter: ...

else:
    ActsAsModule = object


def delegated(model: WrappedModule, name: str) -> Any:
    """Returns what a wrapper has of its module.

    Args:
        model: the wrapper.
        name: one of `DELEGATED`.
    """
    if name in _ASKED:
        # Where the weights will be is known when they are there; inputs are moved to that.
        module = model.load() if name == "device" else model.module
        weights = [weight for weight in module.parameters() if weight.is_floating_point()]
        weight = weights[0] if weights else torch.empty(0)
        return getattr(weight, name)
    if name in _READING:
        return getattr(model.load(), name)
    if name == "eval" and not model.loaded:  # as it will be loaded
        return lambda: model
    return _changing(model, name)


def _changing(model: WrappedModule, name: str) -> Callable[..., Any]:
    """A method of the module that changes it in place; it returns the wrapper."""

    def change(*args: Any, **kwargs: Any) -> WrappedModule:
        getattr(model.load(), name)(*args, **kwargs)
        return model

    return change
