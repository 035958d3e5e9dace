"""Checks of received nodes whose arguments must be of a form of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from insitu.graph.errors import WireError
from insitu.graph.node import Graph, Ref, WeightRef
from insitu.graph.operations import ATTRIBUTE, BACKWARD, BY_NAME, GRAD, Operation


def check_derivative(
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
            right = right and isinstance(named, list)
            right = right and all(isinstance(item, WeightRef) for item in cast("list[Any]", named))
        flags = [kwargs.get(name) for name in _FLAGS_OF_BACKWARD]
        right = right and all(flag is None or isinstance(flag, bool) for flag in flags)
    if not right:
        raise WireError(f"{operation.name} cannot be called so")


_FLAGS_OF_BACKWARD = (
    *("retain_graph", "create_graph", "accumulate", "allow_unused", "materialize_grads"),
)


def check_put(args: tuple[Any, ...]) -> None:
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
