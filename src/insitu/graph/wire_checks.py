"""Checks of received nodes: that a recording could have made them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, cast

import msgspec
import torch

from insitu.graph.errors import WireError
from insitu.graph.node import EVERY, Graph, Kind, ModuleRef, Ref, Subgraph, WeightRef
from insitu.graph.operations import (
    APPLY,
    ATTRIBUTE,
    BACKWARD,
    BY_NAME,
    COND,
    FOLD,
    GRAD,
    KEEP,
    PULL_BACK,
    PUT,
    READ,
    SAVE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.wire_message import Index
from insitu.graph.written_arguments import written_arguments

_ADDRESS = tuple[Index, str, Kind, Index, Annotated[int, msgspec.Meta(ge=EVERY)]]

# Which of the arguments of an operation are functions, and of what kind they are.
FUNCTIONS: Mapping[Operation, Mapping[int, type]] = {
    APPLY: {0: ModuleRef},
    PULL_BACK: {0: ModuleRef},
    COND: {1: Subgraph, 2: Subgraph},
    FOLD: {0: Subgraph},
}
_TARGETS = {WRITE: (READ, GRAD, WRITE, PUT), SKIP: (READ,)}


def check_address(args: tuple[Any, ...], kwargs: Mapping[str, Any], seen: set[Any]) -> None:
    """Checks that a node reads a site, and one that no other reads.

    Args:
        args: its arguments: the address of the site.
        kwargs: its keyword arguments.
        seen: the addresses that are read so far. It gets this one.

    Raises:
        WireError: if no recording makes such a node.
    """
    try:
        msgspec.convert(args, _ADDRESS)
    except msgspec.ValidationError as error:
        raise WireError(f"no site has the address {args}: {error}") from None
    if kwargs or args in seen:
        raise WireError(f"the site {args} is read twice, or with keywords")
    seen.add(args)


def check_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: int) -> None:
    """Checks that a node stands for an input of its function.

    Args:
        args: its arguments: which input.
        kwargs: its keyword arguments.
        inputs: how many there are.

    Raises:
        WireError: if there is no such input.
    """
    if kwargs or len(args) != 1 or type(args[0]) is not int or not 0 <= args[0] < inputs:
        raise WireError(f"a function has no input {args}: it is called with {inputs}")


def check_call(
    graph: Graph, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Checks what a recording sees to: without it, planning or printing a graph could fail.

    Args:
        graph: the graph that the node is in.
        operation: what it does.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        WireError: if no recording makes such a node.
    """
    own = "." not in operation.name and operation not in FUNCTIONS
    if operation.in_place:
        raise WireError(f"{operation.name} writes in place: that is a part of what `put` does")
    if own and not (args and type(args[0]) is Ref):
        raise WireError(f"{operation.name} is not done to a value of the run")
    if not args and operation.name.startswith(("Tensor.", "operator.")):
        raise WireError(f"{operation.name} is not done to anything")
    if operation is PUT:
        _check_put(args)
    elif kwargs and "." not in operation.name and operation not in (BACKWARD, APPLY):
        raise WireError(f"{operation.name} takes no keywords")
    if operation is GRAD or operation is BACKWARD:
        _check_derivative(graph, operation, args, kwargs)
    if operation in _TARGETS:
        target = graph.rows[args[0].index][0]
        if target not in _TARGETS[operation]:
            raise WireError(f"{operation.name} is done to what {target.name} gives")
    if operation in (SAVE, KEEP) and len(args) > 1 and not _is_device(args[1]):
        raise WireError(f"{operation.name} cannot be called so: {args[1]!r} is no device")
    given = kwargs
    if (signature := _signature(operation)) is not None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise WireError(f"{operation.name} cannot be called so: {error}") from None
    if given.get("out") is not None or given.get("inplace", False) is not False:
        raise WireError(f"{operation.name} would write into one of its arguments")
    into, instead = written_arguments(operation, args, kwargs)
    if into:
        raise WireError(f"{operation.name} would write into its arguments: {instead}")


def _is_device(name: Any) -> bool:
    """Whether PyTorch knows a device by this name."""
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False


def _check_derivative(
    graph: Graph, operation: Operation, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Checks that a gradient is of a backward pass, and what such a pass starts from and names.

    Args:
        graph: the graph that the node is in.
        operation: what it does.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        WireError: if no recording makes such a node.
    """
    called: Sequence[Any] = args
    right = all(type(arg) is Ref for arg in called)
    if operation is GRAD:
        right = right and len(called) <= 2
        right = right and all(graph.rows[arg.index][0] is BACKWARD for arg in called[1:])
    else:
        named = kwargs.get("inputs")
        if named is not None:
            # A tensor of the user's is a leaf here. The run refuses one that requires no grad.
            right = right and isinstance(named, list)
            kinds = (WeightRef, torch.Tensor)
            right = right and all(isinstance(item, kinds) for item in cast("list[Any]", named))
        flags = [kwargs.get(name) for name in _FLAGS_OF_BACKWARD]
        right = right and all(flag is None or isinstance(flag, bool) for flag in flags)
    if not right:
        raise WireError(f"{operation.name} cannot be called so")


_FLAGS_OF_BACKWARD = (
    *("retain_graph", "create_graph", "accumulate", "allow_unused", "materialize_grads"),
)


def _check_put(args: tuple[Any, ...]) -> None:
    """Checks that a write in place names views that lead to what it writes, and what writes.

    Args:
        args: the arguments of the node.

    Raises:
        WireError: if no recording makes such a node.
    """
    called: Sequence[Any] = args
    steps, name = called[1:3] if len(called) > 2 else (None, None)
    right = isinstance(steps, tuple) and all(map(_is_step, cast("tuple[Any, ...]", steps)))
    if not right or not isinstance(name, str) or name not in BY_NAME or not BY_NAME[name].in_place:
        raise WireError("put cannot be called so: it takes a value, views and what writes")


def _is_step(step: Any) -> bool:
    match step:
        case (str() as name, (int() | str()) as place, tuple(), dict()):
            known = name in BY_NAME and not BY_NAME[name].in_place
            known = known and ("." in name or name == ATTRIBUTE.name)
            return known and (isinstance(place, str) or place >= 0)
        case _:
            return False


@cache
def _signature(operation: Operation) -> inspect.Signature | None:
    """How an operation is called, if Python knows; of torch's own functions it does not."""
    try:
        return inspect.signature(operation.function)
    except ValueError:
        return None
