"""Control flow and functions: decisions by values, and calls that are no recorded operations.

`cond` and `fold` record the functions that they are given as graphs of their own, so that they
remain data. `apply` takes any function, which the wire format refuses.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from insitu.graph.before_torch import stand_before_torch
from insitu.graph.dispatch import recording_of
from insitu.graph.encoding import add_input, add_node, capture, encode
from insitu.graph.errors import OperationError
from insitu.graph.location import Location, Mark, mark
from insitu.graph.node import NO_KWARGS, Function, ModuleRef, Subgraph, readable, ref
from insitu.graph.operations import APPLY, COND, FOLD, PULL_BACK
from insitu.graph.proxy import Proxy, StructureProxy
from insitu.graph.recorded import Recorded
from insitu.graph.recording import Recording, branches
from insitu.graph.structure import map_structure
from insitu.graph.whole_calls import record_call

stand_before_torch()


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a Python function on the real values, while the model runs.

    The function must not write into its arguments, and its graph cannot be sent anywhere: where
    recorded operations will do, they are better.

    Args:
        function: any function, or a module of the user's own.
        args: recorded values, constants, or containers of both.
        kwargs: the same, by keyword.

    Returns:
        A proxy for what the function returns.

    Raises:
        OperationError: if no argument is a value of an open block.

    Example:
        >>> import torch
        >>> from insitu import Model, apply
        >>> model = Model(torch.nn.Linear(2, 3))
        >>> with model.trace(torch.ones(1, 2)):
        ...     shape = apply(lambda x: tuple(x.shape), model.output).save()
        >>> shape.value
        (1, 3)
    """
    line = mark()
    recording = _open_recording((args, kwargs), "apply", line)
    return record_call(Proxy, recording, Function(function), args, kwargs, line)


def call_module(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], line: Mark) -> Any:
    """Records a call of one of the model's own modules on values; no hook sees it.

    Args:
        path: the module's path.
        args: its arguments.
        kwargs: its keyword arguments.
        line: the user's line.

    Raises:
        OperationError: if no argument is a value of an open block.
    """
    recording = _open_recording((args, dict(kwargs)), readable(path), line)
    args, kwargs = _whole((args, dict(kwargs)))
    return Proxy(recording, add_node(recording, APPLY, (ModuleRef(path), *args), kwargs, line))


def pull_back(path: str, value: Any, gradients: Any, line: Mark) -> Any:
    """Records that gradients go back through one of the model's own modules.

    Args:
        path: the module's path. It does the same to each row.
        value: what the module is given, `(1, ...)`.
        gradients: gradients at what it makes of that, `(row, ...)`.
        line: the user's line.

    Returns:
        A proxy for the gradients at the value, `(row, ...)`.
    """
    recording = _open_recording((value, gradients), "pull_back", line)
    args = (ModuleRef(path), *_whole((value, gradients)))
    return Proxy(recording, add_node(recording, PULL_BACK, args, NO_KWARGS, line))


def _no_function(*_: Any) -> Any:
    """Stands for a function that was not given."""


def cond(
    pred: Any,
    then: Callable[..., Any] = _no_function,
    otherwise: Callable[..., Any] = _no_function,
    *operands: Any,
) -> Any:
    """Records that a value decides which of two functions is computed.

    Args:
        pred: a proxy for one number or truth value.
        then: a function of the operands, used if the value is true. It may use other values of the
            block, and returns values or containers of them.
        otherwise: a function of the same kind, used if the value is false.
        operands: what the functions are called with.

    Returns:
        A proxy for what the function returns.

    Raises:
        OperationError: if `pred` is no value of an open block, if a function is missing, or if one
            writes to the model.

    Example:
        >>> import torch
        >>> from insitu import Model, cond
        >>> model = Model(torch.nn.Identity())
        >>> with model.trace(torch.tensor([-3.0])):
        ...     size = cond(model.output.sum() > 0, lambda x: x, lambda x: -x, model.output).save()
        >>> size.value
        tensor([3.])
    """
    line = mark()
    if otherwise is _no_function or not (callable(then) and callable(otherwise)):
        raise OperationError(
            "`cond` is no context: it takes two functions. Write `y = insitu.cond(pred, lambda x: "
            "x * 2, lambda x: x, x)`, and write `y` to the model outside of them.",
            Location(*line),
        )
    recording = _open_recording((pred, operands), "cond", line)
    first, captured = _recorded(recording, then, len(operands), [], line)
    second, captured = _recorded(recording, otherwise, len(operands), captured, line)
    args = (pred, first, second, *_whole(operands), *_from(recording, captured))
    return Proxy(recording, add_node(recording, COND, args, NO_KWARGS, line))


def fold(function: Callable[[Any, Any], Any], init: Any, xs: Any) -> Any:
    """Records a loop: `carry = function(carry, x)` for each `x`, from a first carry on.

    Args:
        function: of the carry and an item; it returns the next carry.
        init: the first carry: a value, a constant or a container of both.
        xs: a tensor with its items along the first axis, or a tuple or list.

    Returns:
        A proxy for the last carry.

    Raises:
        OperationError: if neither carry nor items are values of an open block.

    Example:
        >>> import torch
        >>> from insitu import Model, fold
        >>> model = Model(torch.nn.Identity())
        >>> with model.trace(torch.tensor([1.0, 2.0, 3.0])):
        ...     value = fold(lambda total, x: total * 2 + x, 0.0, model.output).save()
        >>> value.value
        tensor(11.)
    """
    line = mark()
    recording = _open_recording((init, xs), "fold", line)
    body, captured = _recorded(recording, function, 2, [], line)
    args = (body, *_whole((init, xs)), *_from(recording, captured))
    return Proxy(recording, add_node(recording, FOLD, args, NO_KWARGS, line))


def _open_recording(values: Any, name: str, line: Mark) -> Recording:
    """Where an operation on values is recorded."""
    recording = recording_of(values)
    if recording is None:
        raise OperationError(
            f"No argument of `{name}` is a value of an open block: call the function itself, or "
            "the module as `handle.module(...)`.",
            Location(*line),
        )
    return recording


def _recorded(
    parent: Recording,
    function: Callable[..., Any],
    count: int,
    captured: Iterable[int],
    line: Mark,
) -> tuple[Subgraph, Iterable[int]]:
    """Records a function as a graph of its own.

    Args:
        parent: what it is used in.
        function: the function.
        count: how many operands it is called with.
        captured: nodes of the parent whose values are given to the graph after the operands.
        line: the user's line.

    Returns:
        The graph, and the nodes whose values are to be given to it after the operands.
    """
    branch = Recording(parent=parent)
    branch.begin()
    inputs = [Proxy(branch, add_input(branch, line)) for _ in range(count)]
    for value in _from(parent, captured):
        capture(branch, value, line)
    was_open, parent.open, parent.suspended = parent.open, False, True
    branches().append(branch)
    try:
        output = encode(branch, function(*inputs), [], line)
    finally:
        branches().pop()
        parent.open, parent.suspended = was_open, False
        branch.open = False
    if branch.saves or branch.graph.differentiates:
        raise OperationError(
            "Inside `cond` and `fold` nothing is saved or differentiated: return it, and do that "
            "outside.",
            Location(*line),
        )
    return Subgraph(branch.graph, output), branch.inside


def _from(recording: Recording, nodes: Iterable[int]) -> list[Recorded]:
    return [Recorded(recording, ref(node)) for node in nodes]


def _whole(values: Any) -> Any:
    """Values with tuples of the model's as what they are, and not as something to be indexed."""

    def leaf(item: Any) -> Any:
        return Recorded(item._recording, item._ref) if isinstance(item, StructureProxy) else item

    return map_structure(leaf, values)
