"""Operations that write into one of their arguments although their names do not say so.

A lookup with `max_norm` normalises the weight that it is given, for good, and a normalisation in
training mode updates running statistics. That is meant where these are tensors of the user's own.
A value of the run is the model's: it may be one of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from insitu.graph.errors import OperationError
from insitu.graph.location import Location
from insitu.graph.node import Graph, Ref, Subgraph
from insitu.graph.operations import BY_NAME, COND, FOLD, Operation


class _Writing(NamedTuple):
    """An operation that writes into arguments.

    Attributes:
        into: the arguments, each by its place and name.
        switch: the place and the name of the argument that says whether it writes.
        default: what that argument is where it is not given.
        instead: what to write instead.
    """

    into: Sequence[tuple[int, str]]
    switch: tuple[int, str]
    default: bool | None
    instead: str


_LOOKUP = "`max_norm` writes into the weight: give `weight.renorm(norm_type, 0, max_norm)` instead"
_STATISTICS = ((1, "running_mean"), (2, "running_var"))
_UPDATE = "it updates running statistics: give clones of them, made before the block, or none"
_NAMED = {
    "embedding": _Writing(((1, "weight"),), (3, "max_norm"), None, _LOOKUP),
    "embedding_bag": _Writing(((1, "weight"),), (3, "max_norm"), None, _LOOKUP),
    "batch_norm": _Writing(_STATISTICS, (5, "training"), False, _UPDATE),
    "instance_norm": _Writing(_STATISTICS, (5, "use_input_stats"), True, _UPDATE),
}
WRITING: Mapping[Operation, _Writing] = {
    BY_NAME[f"functional.{name}"]: found for name, found in _NAMED.items()
}
"""The operations that may do so."""


def written_arguments(
    operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], str]:
    """Returns the arguments that an operation writes into, and what to write instead.

    Args:
        operation: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
    """
    found = WRITING.get(operation)
    if found is None:
        return [], ""

    def given(place: int, name: str, default: Any = None) -> Any:
        return args[place] if len(args) > place else kwargs.get(name, default)

    if given(*found.switch, found.default) in (None, False):
        return [], ""
    into = [given(*one) for one in found.into]
    return [one for one in into if one is not None], found.instead


def check_arguments(graph: Graph) -> None:
    """Checks that no operation writes into a value of the run without saying so.

    Args:
        graph: the recorded experiment.

    Raises:
        OperationError: if one does.
    """
    for operation, args, kwargs, _, _, mark in graph.rows:
        if operation in WRITING:
            into, instead = written_arguments(operation, args, kwargs)
            if any(type(one) is Ref for one in into):
                raise OperationError(
                    f"`{operation.short}` would write into a value of the run, which may be one of "
                    f"the model's weights: {instead}.",
                    Location(*mark),
                )
        elif operation is COND or operation is FOLD:
            for arg in args:
                if isinstance(arg, Subgraph):
                    check_arguments(arg.graph)
