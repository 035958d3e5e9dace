"""How many rows and positions the hidden states of each block have in a forward."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from insitu.engine.dataflow import Dataflow


def hidden_sizes(
    flow: Dataflow, blocks: Iterable[str], lengths: Collection[int]
) -> tuple[dict[str, tuple[int, int]], frozenset[int]]:
    """Returns rows and positions by the block's path, and all numbers of positions that there are.

    Args:
        flow: the dataflow of the forward.
        blocks: the paths of the blocks. Those that did not run are left out.
        lengths: the numbers of positions that the forward was given.
    """
    known = set(lengths)
    sizes: dict[str, tuple[int, int]] = {}
    for path in blocks:
        index = next(flow.calls(path), None)
        if index is None:
            continue
        # A block may return more than hidden states, also in front of them.
        returned = [flow.shapes[value] for value in flow.events[index].outputs]
        shapes = [shape for shape in returned if len(shape) == 3] or returned[:1]
        if shapes and len(shapes[0]) >= 2:
            # Some keep several streams, one behind the other.
            several = len(shapes[0]) == 4 and shapes[0][2] in known
            rows, positions = shapes[0][1:3] if several else shapes[0][:2]
            sizes[path] = (rows, positions)
            known.add(positions)
    return sizes, frozenset(known)
