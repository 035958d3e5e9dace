"""Calls that are recorded as a whole: what PyTorch cannot be asked about operation by operation.

A `torch.autograd.Function` has a backward of its own, which the operations in its forward do not
have. PyTorch asks nobody before it runs such a forward, so this file stands before
`torch.autograd.Function.apply`: with a recorded value among the arguments the call becomes one
node. An operator of `torch.library.custom_op` is such a call too. So is a recurrent layer, whose
forward makes tensors of sizes that a recorded value does not have yet.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import Function as AutogradFunction
from torch.utils.checkpoint import CheckpointFunction

from insitu.graph.dispatch import at_once, recording_of
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark, mark
from insitu.graph.node import Function
from insitu.graph.operations import APPLY
from insitu.graph.proxy import Proxy, StructureProxy
from insitu.graph.recorded import AnyRecorded, Recorded
from insitu.graph.recording import Recording
from insitu.graph.structure import map_structure

_CONTAINERS = (tuple, list, dict)


def record_call(
    recording: Recording,
    function: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    line: Mark,
) -> Proxy:
    """Records a call of a Python function; it may be given anything.

    Args:
        recording: where it is recorded.
        function: the function.
        args: recorded values, constants and other Python objects, or containers of them.
        kwargs: likewise.
        line: the user's line.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, StructureProxy):  # a tuple may be given as what it is
            return Recorded(item._recording, item._ref)
        is_plain = isinstance(item, AnyRecorded | torch.Tensor) or not _is_opaque(item)
        return item if is_plain else Function(cast(Any, item))

    args, kwargs = map_structure(leaf, (args, dict(kwargs)))
    return Proxy(recording, recording.apply(APPLY, (function, *args), kwargs, line))


def _is_opaque(item: Any) -> bool:
    """Whether a node cannot hold a thing as a constant."""
    return callable(item) or not isinstance(item, _CONSTANTS)


_CONSTANTS = (
    *(type(None), bool, int, float, complex, str, bytes, type(...), slice),
    *(torch.Size, torch.device, torch.dtype, torch.layout, torch.memory_format),
)


def call_whole(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    on_fakes: Callable[..., Any] | None = None,
) -> Any:
    """Records a call of something of the user's that torch runs as a whole.

    After the run it is called with the values at once.

    Args:
        name: what it is called in messages.
        function: what is called.
        args: its arguments, a recorded value among them.
        kwargs: its keyword arguments.
        on_fakes: what is called with fake tensors if a shape is asked for, if not the function.
    """
    recording = recording_of((args, dict(kwargs)))
    if recording is None:
        return at_once(function, args, kwargs)

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    called.__name__ = called.__qualname__ = name
    return record_call(recording, Function(called, on_fakes or function), args, kwargs, mark(3))


_apply_in_torch: Callable[..., Any] = cast(Any, AutogradFunction).apply.__func__


@functools.wraps(_apply_in_torch)
def _apply(cls: type[AutogradFunction], *args: Any, **kwargs: Any) -> Any:
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, AnyRecorded) or (isinstance(arg, _CONTAINERS) and _holds_recorded(arg)):
            if cls is CheckpointFunction:  # it saves memory, and changes no result
                return args[0](*args[2:])
            function = functools.partial(_apply_in_torch, cls)
            return call_whole(f"{cls.__qualname__}.apply", function, args, kwargs)
    return _apply_in_torch(cls, *args, **kwargs)


def _holds_recorded(value: Any) -> bool:
    """Whether a value of a run is in a structure, of which nothing is built anew."""
    if isinstance(value, dict):
        value = list(cast("dict[Any, Any]", value).values())
    if isinstance(value, tuple | list):
        return any(map(_holds_recorded, cast("list[Any]", value)))
    return isinstance(value, AnyRecorded)


def refuse_inside_forward(line: Mark) -> None:
    """Raises if a line is recorded while torch runs the forward of an `autograd.Function`.

    That happens where the value came in by another way than as an argument. What is recorded then
    would lose the function's own backward.

    Args:
        line: the user's line.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _apply_in_torch.__code__:
            name = frame.f_locals["cls"].__qualname__
            raise OperationError(
                f"The forward of {name} uses a value of the run that it is not given as an "
                f"argument, or its `apply` was taken before insitu was imported, so that its own "
                f"backward would be lost: call `{name}.apply(...)`, by that name, with all values "
                "of the run that it needs.",
                Location(*line),
            )
        frame = frame.f_back


def is_custom_operator(function: Any) -> bool:
    """Returns whether this is an operator that a library or the user has added to PyTorch."""
    packet = getattr(function, "overloadpacket", function)
    name = getattr(packet, "_qualified_op_name", "")
    return bool(name) and name.partition("::")[0] not in ("aten", "prim", "prims")


def call_operator(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Records a call of a custom operator.

    Raises:
        OperationError: if it writes into its arguments.
    """
    overload = operator if hasattr(operator, "_schema") else operator.default
    name = overload._schema.name
    if overload._schema.is_mutable:
        raise OperationError(
            f"`{name}` writes into what it is given, which is not recorded: give the operator a "
            "form that returns what it makes.",
            Location(*mark(3)),
        )
    return call_whole(name, operator, args, kwargs)


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
        now, layer.training = layer.training, training
        try:
            return forward(layer, *args, **kwargs)
        finally:
            layer.training = now

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

    return call_whole(type(layer).__name__, called, args, kwargs, on_fakes)


def _fake(weight: torch.Tensor) -> torch.Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype)


def stand_before_torch() -> None:
    """Lets what PyTorch runs as a whole be recorded where it is given recorded values."""
    cast(Any, AutogradFunction).apply = classmethod(_apply)
    for kind in _RECURRENT:
        cast(Any, kind).forward = _recurrent(kind.forward)
