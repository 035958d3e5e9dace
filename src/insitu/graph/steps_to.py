"""One view as the step that leads to it from its parent. `Views.located` strings them together."""

from __future__ import annotations

from insitu.graph.node import Ref, Row
from insitu.graph.put import Step


def held_by(row: Row) -> list[int]:
    """Returns the nodes that are arguments of a node, and not parts of arguments.

    Args:
        row: the node.
    """
    _, args, kwargs, *_ = row
    return [item.index for item in (*args, *kwargs.values()) if type(item) is Ref]


def step_of(row: Row) -> tuple[Step, list[int]]:
    """Returns the step to a view, and the other nodes that its geometry comes from.

    Args:
        row: the view.
    """
    operation, args, kwargs, inputs, _, _ = row
    first = args[0] if args else None
    if type(first) is Ref and len(inputs) == 1:  # nearly all
        return (operation.name, 0, args[1:], kwargs), []
    parent = next(iter(held_by(row)))
    others = [*inputs]
    others.remove(parent)
    for at, arg in enumerate(args):
        if type(arg) is Ref and arg.index == parent:
            return (operation.name, at, (*args[:at], *args[at + 1 :]), kwargs), others
    name = next(key for key, arg in kwargs.items() if type(arg) is Ref and arg.index == parent)
    kwargs = {key: arg for key, arg in kwargs.items() if key != name}
    return (operation.name, name, args, kwargs), others
