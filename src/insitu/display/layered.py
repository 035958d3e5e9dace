"""Graphs in layers: where nodes stand, so that edges go one way and cross little.

The method of Sugiyama, Tagawa and Toda (1981). An edge over several layers passes through a place
of its own in each. The places of a layer are put in the order of their neighbours' means, and then
moved towards them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Edge = tuple[int, int]
_SWEEPS = 8
_THIN = 10.0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where nodes stand and edges go.

    Attributes:
        x: the middle of each node, from 0.
        width: of all.
        routes: of each edge its x in each layer that it passes, from its first to its last.
    """

    x: Sequence[float]
    width: float
    routes: Sequence[Sequence[float]]


def layers_of(count: int, edges: Sequence[Edge]) -> list[int]:
    """Returns the layer of each node: one more than the highest of those that lead to it.

    Args:
        count: how many nodes there are.
        edges: from which to which, each from a lower number to a higher one.
    """
    layers = [0] * count
    for source, target in sorted(edges, key=lambda edge: edge[1]):
        layers[target] = max(layers[target], layers[source] + 1)
    return layers


def place(
    layers: Sequence[int], edges: Sequence[Edge], widths: Sequence[float], gap: float
) -> Layout:
    """Returns where nodes stand and edges go.

    Args:
        layers: the layer of each node.
        edges: from which to which, each from a lower layer to a higher one.
        widths: of each node.
        gap: between two that are beside each other.
    """
    all_layers, all_widths = list(layers), list(widths)
    chains: list[list[int]] = []
    for source, target in edges:
        chain = [source]
        for layer in range(layers[source] + 1, layers[target]):
            chain.append(len(all_layers))
            all_layers.append(layer)
            all_widths.append(_THIN)
        chains.append([*chain, target])
    count = len(all_layers)
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for chain in chains:
        for source, target in pairwise(chain):
            above[target].append(source)
            below[source].append(target)
    rows: list[list[int]] = [[] for _ in range(max(all_layers, default=-1) + 1)]
    for node, layer in enumerate(all_layers):
        rows[layer].append(node)
    _order(rows, above, below)
    x = _spread(rows, above, below, all_widths, gap)
    left = min((x[node] - all_widths[node] / 2 for node in range(count)), default=0.0)
    right = max((x[node] + all_widths[node] / 2 for node in range(count)), default=0.0)
    x = [at - left for at in x]
    routes = [[x[node] for node in chain] for chain in chains]
    return Layout(x[: len(layers)], right - left, routes)


def _order(
    rows: list[list[int]], above: Sequence[Sequence[int]], below: Sequence[Sequence[int]]
) -> None:
    """Puts each layer in an order with few crossings."""
    at = {node: float(place) for row in rows for place, node in enumerate(row)}
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        near = above if down else below
        for row in rows if down else reversed(rows):
            row.sort(key=lambda node: _mean([at[n] for n in near[node]], at[node]))
            at.update((node, float(place)) for place, node in enumerate(row))
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    for row, found in zip(rows, best, strict=True):
        row[:] = found


def _crossings(rows: Sequence[Sequence[int]], below: Sequence[Sequence[int]]) -> int:
    """How many edges between neighbouring layers cross."""
    count = 0
    for row, following in pairwise(rows):
        at = {node: place for place, node in enumerate(following)}
        tree = [0] * (len(following) + 1)  # of Fenwick: how many edges end at or before a place
        seen = 0
        for node in row:
            ends = [at[target] for target in below[node]]
            for end in ends:
                before, place = 0, end + 1
                while place:
                    before += tree[place]
                    place -= place & -place
                count += seen - before
            for end in ends:
                place = end + 1
                while place < len(tree):
                    tree[place] += 1
                    place += place & -place
                seen += 1
    return count


def _spread(
    rows: Sequence[Sequence[int]],
    above: Sequence[Sequence[int]],
    below: Sequence[Sequence[int]],
    widths: Sequence[float],
    gap: float,
) -> list[float]:
    """The x of each node: near its neighbours, and apart from those beside it."""
    x = [0.0] * len(widths)
    for row in rows:
        end = 0.0
        for node in row:
            x[node] = end + widths[node] / 2
            end += widths[node] + gap
        for node in row:
            x[node] -= end / 2
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            near = above if down else below
            wanted = [_mean([x[n] for n in near[node]], x[node]) for node in row]
            apart = [(widths[a] + widths[b]) / 2 + gap for a, b in pairwise(row)]
            right, left = list(wanted), list(wanted)
            for place, least in enumerate(apart):
                right[place + 1] = max(right[place + 1], right[place] + least)
            for place in range(len(apart) - 1, -1, -1):
                left[place] = min(left[place], left[place + 1] - apart[place])
            for node, a, b in zip(row, left, right, strict=True):
                x[node] = (a + b) / 2
    return x


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
