"""Calls that are recorded as a whole: of the user's functions, and of operators of libraries.

What stands in their forwards is not recorded: it may be anything, and has a backward of its own.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from insitu.graph.dispatch import at_once, recording_of
from insitu.graph.encoding import add_node
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark, mark
from insitu.graph.node import Function
from insitu.graph.operations import APPLY
from insitu.graph.recorded import AnyRecorded, Recorded
from insitu.graph.recording import Recording
from insitu.graph.structure import CONSTANTS, map_structure


def record_call(
    kind: type[Recorded],
    recording: Recording,
    function: Function,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    line: Mark,
) -> Any:
    """Records a call of a Python function; it may be given anything.

    Args:
        kind: the class of proxies.
        recording: where it is recorded.
        function: the function.
        args: recorded values, constants and other Python objects, or containers of them.
        kwargs: the same, by keyword.
        line: the user's line.
    """

    def leaf(item: Any) -> Any:
        if isinstance(item, AnyRecorded) and not item._operand:  # a tuple is given as what it is
            return Recorded(item._recording, item._ref)
        if isinstance(item, AnyRecorded | torch.Tensor):
            return item
        opaque = callable(item) or not isinstance(item, CONSTANTS)
        return Function(cast(Any, item)) if opaque else item

    args, kwargs = map_structure(leaf, (args, dict(kwargs)))
    return kind(recording, add_node(recording, APPLY, (function, *args), kwargs, line))


def call_whole(
    kind: type[Recorded],
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    on_fakes: Callable[..., Any] | None = None,
) -> Any:
    """Records a call of something of the user's that torch runs as a whole.

    After the run it is called with the values at once.

    Args:
        kind: the class of proxies.
        name: what it is called in messages.
        function: the function that is called.
        args: its arguments, a recorded value among them.
        kwargs: its keyword arguments.
        on_fakes: called with fake tensors if a shape is asked for; None for the function itself.
    """
    recording = recording_of((args, dict(kwargs)))
    if recording is None:
        return at_once(function, args, kwargs)

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    called.__name__ = called.__qualname__ = name
    return record_call(
        kind, recording, Function(called, on_fakes or function), args, kwargs, mark(3)
    )


def is_custom_operator(function: Any) -> bool:
    """Returns whether this is an operator that a library or the user has added to PyTorch."""
    packet = getattr(function, "overloadpacket", function)
    name = getattr(packet, "_qualified_op_name", "")
    return bool(name) and name.partition("::")[0] not in ("aten", "prim", "prims")


def call_operator(
    kind: type[Recorded], operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Records a call of a custom operator.

    Args:
        kind: the class of proxies.
        operator: the operator.
        args: its arguments, a recorded value among them.
        kwargs: its keyword arguments.

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
    return call_whole(kind, name, operator, args, kwargs)
