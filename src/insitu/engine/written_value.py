"""What stands at a site after the writes of the invocations that share a pass."""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from insitu.engine.execution import Execution
from insitu.engine.model_call import Cut
from insitu.graph.errors import IndexOutOfRangeError
from insitu.graph.location import Location
from insitu.graph.node import Place, Site
from insitu.graph.structure import clone, map_structure


def changed_value(
    execution: Execution,
    place: Place,
    value: Any,
    found: Sequence[tuple[int, int]],
    cuts: Mapping[int, Cut | None],
    step: int = 0,
) -> Any:
    """What stands at a site after the writes of its invocations: always memory of its own.

    A module may go on to write into what it is given, and that must not reach a constant of the
    user's or a value that is still used.

    Args:
        execution: has the values.
        place: where the value arrived.
        value: what arrived. It is returned itself if nothing is written.
        found: the nodes that read it, each with its invocation.
        cuts: the invocations' own parts of it.
        step: in which step it arrived.
    """
    plan, fresh = execution.plan, value
    for index, invocation in found:
        if index not in plan.writes:
            continue
        own, cut = execution.written(index), cuts[invocation]
        if cut is None:
            known = own is value or index in plan.unshared
            fresh = own if known else _copied_where_new(own, value)
            continue
        site = Site(invocation, *place, step)
        if fresh is value:
            fresh = map_structure(clone, cut.widen(site, value))
        cut.put(site, fresh, own)
    return fresh


def check_tokens(tokens: torch.Tensor, vocabulary: int, location: Location) -> None:
    """Raises if tokens that a line chooses are not in the vocabulary.

    Args:
        tokens: the tokens.
        vocabulary: how many tokens there are.
        location: the line.

    Raises:
        IndexOutOfRangeError: if one is not.
    """
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if wrong.numel():
        raise IndexOutOfRangeError(
            f"There is no token {int(wrong[0])}: the model has tokens 0 to {vocabulary - 1}.",
            location,
        )


def _copied_where_new(own: Any, value: Any) -> Any:
    """A copy of a value, but for the tensors that were there before."""
    if type(own) is torch.Tensor:
        return own.clone()
    if type(own) is tuple and len(cast("tuple[Any, ...]", own)) == 1:  # a transformer block's
        return (_copied_where_new(own[0], value[0]),)
    before: set[int] = set()
    map_structure(lambda leaf: before.add(id(leaf)), value)
    return map_structure(lambda leaf: leaf if id(leaf) in before else clone(leaf), own)
