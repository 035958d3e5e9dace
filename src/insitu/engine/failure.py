"""The error to raise for an operation that failed, at the line that recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from insitu.graph.errors import ExecutionError, InsituError
from insitu.graph.expression import expression, located
from insitu.graph.node import Graph
from insitu.graph.operations import BACKWARD
from insitu.graph.shapes import misfit


def failure(graph: Graph, values: Sequence[Any], index: int, error: Exception) -> InsituError:
    """Returns the error to raise for a node.

    Args:
        graph: what was being done.
        values: the values of the run so far, by node.
        index: the node that failed.
        error: what it raised.
    """
    node = graph[index]
    if isinstance(error, InsituError):  # of an operation of ours, which knows no line
        return located(graph, index, error)
    written = expression(graph, index)
    found = [values[source] for source in node.inputs]
    other = isinstance(error, torch.OutOfMemoryError) or node.operation is BACKWARD
    if isinstance(error, RuntimeError | IndexError | ValueError) and found and not other:
        return misfit(graph, index, found, error)
    kinds = ", ".join(type(value).__name__ for value in found[:20])
    said = f"{type(error).__name__}: {error!s:.2000}"
    message = f"`{written}` failed on values of type {kinds}: {said}"
    return ExecutionError(message, node.location)
