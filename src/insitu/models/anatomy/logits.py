"""Where a forward makes its logits, and the norm before them, found in the dataflow.

What comes before that, in the blocks, is in `block.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from insitu.engine.dataflow import Dataflow
from insitu.models.anatomy.between import MOVES, SCALES
from insitu.models.parts import Spot


def final_norm_of(
    flow: Dataflow, modules: Mapping[str, nn.Module], blocks: Collection[str], head: str | None
) -> str | None:
    """Returns the path of the norm whose output is unembedded, None if there is none.

    Args:
        flow: the dataflow of a forward.
        modules: the model's tree, by path.
        blocks: the paths of its blocks.
        head: the path of the layer that unembeds, None if there is none.
    """
    norm: str | None = None
    for index in flow.calls(head) if head is not None else ():
        norm = _norm_before(flow, flow.events[index].inputs[0], modules)
    if norm is not None and any(norm.startswith(f"{path}.") for path in blocks):
        return None  # it is the last block's own
    return norm


def logits_of(flow: Dataflow, head: str | None) -> Spot | None:
    """Returns where the logits are, None if the model returns none.

    Args:
        flow: the dataflow of a forward.
        head: the path of the layer that unembeds, None if there is none.
    """
    whole = next(flow.calls(""), None)
    results = None if whole is None else flow.results[whole]
    value = results.get("logits") if isinstance(results, Mapping) else None
    if type(value) is not int:
        return None
    for returned in flow.returned[value]:
        event = flow.events[returned.event]
        if event.path == head and not returned.item:
            return Spot(event.path, "output", event.call, (), flow.shapes[value])
    return Spot("", "output", 0, ("logits",), flow.shapes[value])


def _norm_before(flow: Dataflow, value: int, modules: Mapping[str, nn.Module]) -> str | None:
    """The norm that a value comes from, through what only moves or scales it."""
    while True:
        for returned in flow.returned.get(value, ()):
            path = flow.events[returned.event].path
            if "norm" in type(modules[path]).__name__.lower():
                return path
        maker = flow.maker(value)
        if maker is None or not maker.inputs or maker.function not in MOVES | SCALES:
            return None
        value = maker.inputs[0]
