"""The end of an error for an operation on a value that is no tensor: which part of it to take.

A transformer block and an attention return tuples, and a model an output with fields. An operation
of tensors on them fails in the words of Python or of torch, which say nothing of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.expression import expression
from insitu.graph.node import Graph
from insitu.graph.operations import ATTRIBUTE
from insitu.habits import OF_OUTPUTS, OF_VALUES, habit

_LIKELY = ("logits", "last_hidden_state")


def hint(graph: Graph, index: int, inputs: Sequence[Any], error: Exception) -> str:
    """Returns what to write in the place of a value that is no tensor, "" where that is not known.

    Args:
        graph: the graph.
        index: the node of the operation that failed.
        inputs: the values of its inputs, fake or not.
        error: what it raised.
    """
    node = graph[index]
    written = expression(graph, index)
    field = written.rpartition(".")[2].partition("[")[0]
    if isinstance(error, AttributeError) and field in OF_OUTPUTS:
        return f"{habit(field, OF_OUTPUTS)}."
    if isinstance(error, AttributeError) and node.operation is ATTRIBUTE and field in OF_VALUES:
        return f"{habit(field, OF_VALUES)}."
    for source, value in zip(node.inputs, inputs, strict=False):
        own = expression(graph, source)
        if isinstance(value, tuple | list) and not value and isinstance(error, IndexError):
            return f". `{own}` is empty{habit(own.rpartition('.')[2], OF_OUTPUTS)}."
        if isinstance(error, KeyError) and isinstance(value, Mapping):
            entries = ", ".join(repr(name) for name in cast("Mapping[Any, Any]", value))
            return f". `{own}` has {entries or 'no entries'}."
        if isinstance(error, TypeError | AttributeError) and (what := part_of(own, value)):
            return f". {what}"
    return ""


def part_of(written: str, value: Any) -> str:
    """Returns a sentence with the part of a value that is a tensor, "" if the value has none.

    Args:
        written: the value as it is written.
        value: the value.
    """
    kind = type(value).__name__
    if isinstance(value, Mapping):
        fields = cast("Mapping[Any, Any]", value)
        names = [name for name in fields if isinstance(fields[name], torch.Tensor)]
        likely = next((name for name in _LIKELY if name in names), names[0] if names else None)
        if likely is None:
            return ""
        part = f"{written}.{likely}" if hasattr(fields, str(likely)) else f"{written}[{likely!r}]"
        return f"`{written}` is a {kind}, not a tensor: write `{part}`."
    if not isinstance(value, tuple | list):
        return ""
    entries = cast("Sequence[Any]", value)
    at = next((at for at, one in enumerate(entries) if isinstance(one, torch.Tensor)), None)
    if at is None:
        return ""
    entry = "its first element" if at == 0 else "a tensor in it"
    return f"`{written}` is a {kind}, not a tensor: write `{written}[{at}]` for {entry}."
