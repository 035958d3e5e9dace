"""The picture of a circuit: from the names of its edges to parts of a model and their layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from insitu.display.circuit_picture import Arrow, Node, circuit_figure

_KINDS = {"a": "attention", "m": "MLP", "s": "state space"}


def picture(
    edges: Sequence[tuple[str, str, float]], sharing: int, title: str, quantity: str, most: int
) -> Any:
    """Returns the edges of a circuit as a figure of plotly.

    Args:
        edges: sender, receiver and score of each, by their names in a circuit.
        sharing: how many heads share keys and values.
        title: what stands over it.
        quantity: what a score is.
        most: how many edges are drawn.
    """
    senders = {sender for sender, _, _ in edges}
    sums: dict[tuple[str, str], float] = defaultdict(float)
    for sender, receiver, score in edges:
        for part in _parts(receiver, senders, sharing):
            sums[sender, part] += score
    names = dict.fromkeys(name for pair in sums for name in pair)
    return circuit_figure(
        [_node(name, names) for name in sorted(names, key=lambda name: _order(name))],
        [Arrow(*pair, score) for pair, score in sums.items()],
        title=title,
        quantity=quantity,
        most=most,
    )


def _parts(receiver: str, senders: set[str], sharing: int) -> list[str]:
    """The parts drawn in the place of a receiver: the heads whose queries, keys or values it is."""
    attention, dot, role = receiver.partition(".")
    if not dot:
        return [receiver]
    number = int(role[1:])
    numbers = [number]
    if role[0] in "kv":
        numbers = [*range(number * sharing, (number + 1) * sharing)]
    heads = [f"{attention}.h{head}" for head in numbers]
    if attention in senders:  # it is not told by heads what this attention adds
        return [attention]
    return [head for head in heads if head in senders] or heads[:1]


def _node(name: str, names: Iterable[str]) -> Node:
    layers = [_order(other)[0] for other in names if other not in ("input", "logits")]
    if name == "input":
        return Node(name, min(layers, default=0) - 1)
    if name == "logits":
        return Node(name, max(layers, default=0) + 1)
    return Node(name, _order(name)[0], "head" if "." in name else _KINDS[name[0]])


def _order(name: str) -> tuple[int, int]:
    """The layer of a part, and which head of it it is."""
    if name in ("input", "logits"):
        return (-1 if name == "input" else 10**9, 0)
    part, _, head = name.partition(".h")
    return int(part[1:]), int(head or 0)
