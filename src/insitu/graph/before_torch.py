"""What stands before functions of PyTorch that ask nobody, and records calls of them as a whole.

A `torch.autograd.Function` has a backward of its own, which the operations in its forward do not
have. PyTorch runs such a forward at once, so this file stands before
`torch.autograd.Function.apply`: with a recorded value among the arguments the call becomes one
node. So does a recurrent layer, whose forward makes tensors of sizes that a recorded value does
not have yet.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import Function as AutogradFunction
from torch.utils.checkpoint import CheckpointFunction

from insitu.graph.context import apply_in_torch
from insitu.graph.proxy import Proxy
from insitu.graph.recorded import AnyRecorded
from insitu.graph.whole_calls import call_whole

_CONTAINERS = (tuple, list, dict)


@functools.wraps(cast(Any, AutogradFunction).apply)
def _apply(cls: type[AutogradFunction], *args: Any, **kwargs: Any) -> Any:
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, AnyRecorded) or (isinstance(arg, _CONTAINERS) and _holds_recorded(arg)):
            if cls is CheckpointFunction:  # it saves memory, and changes no result
                return args[0](*args[2:])
            function = functools.partial(apply_in_torch, cls)
            return call_whole(Proxy, f"{cls.__qualname__}.apply", function, args, kwargs)
    return apply_in_torch(cls, *args, **kwargs)


def _holds_recorded(value: Any) -> bool:
    """Whether a value of a run is in a structure. Nothing of the structure is built anew."""
    if isinstance(value, dict):
        value = list(cast("dict[Any, Any]", value).values())
    if isinstance(value, tuple | list):
        return any(map(_holds_recorded, cast("list[Any]", value)))
    return isinstance(value, AnyRecorded)


_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def _recurrent(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a recurrent layer, recorded as a whole for recorded values."""
    holds_recorded, call = _holds_recorded, _call_layer

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if holds_recorded((args, kwargs)):
            return call(self, forward, args, kwargs)
        return forward(self, *args, **kwargs)

    # With the names of the original's file: `torch.jit.script` compiles that by its source.
    made = FunctionType(wrapped.__code__, forward.__globals__, closure=wrapped.__closure__)
    return functools.wraps(forward)(made)


def _call_layer(layer: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Records a call of a layer without parts, in the mode that it is in now."""
    training = layer.training

    def called(*args: Any, **kwargs: Any) -> Any:
        if layer.training == training:
            return forward(layer, *args, **kwargs)
        twin = object.__new__(type(layer))  # the layer itself may be used by others meanwhile
        vars(twin).update({**vars(layer), "training": training})
        return forward(twin, *args, **kwargs)

    def on_fakes(*args: Any, **kwargs: Any) -> Any:
        weights = {name: _fake(weight) for name, weight in layer.named_parameters()}
        twin = object.__new__(type(layer))
        own: dict[str, Any] = {**vars(layer), "_parameters": weights}
        if isinstance(layer, nn.RNNBase):
            names = cast("list[str]", cast(Any, layer)._flat_weights_names)
            own["_flat_weights"] = [weights[name] for name in names]
            own["_flat_weight_refs"] = [None for _ in own["_flat_weights"]]
        vars(twin).update(own)
        return forward(twin, *args, **kwargs)

    return call_whole(Proxy, type(layer).__name__, called, args, kwargs, on_fakes)


def _fake(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype)


def stand_before_torch() -> None:
    """Lets what PyTorch runs as a whole be recorded where it is given recorded values."""
    cast(Any, AutogradFunction).apply = classmethod(_apply)
    for kind in _RECURRENT:
        cast(Any, kind).forward = _recurrent(kind.forward)
