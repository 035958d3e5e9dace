"""What the passes of a run cost beside each other: how far a run has come after each."""

from __future__ import annotations

from collections.abc import Sequence

from insitu.batching.summary import Summary


def pass_costs(passes: Sequence[Summary]) -> list[float]:
    """Returns what each pass costs: floating-point operations, or whatever else is known.

    Args:
        passes: what those of a run do.
    """
    if len(passes) == 1:
        return [1.0]
    if all(single.flops for single in passes):
        return [single.flops for single in passes]
    places = [single.rows * single.positions * single.run for single in passes]
    return [float(place) for place in places] if all(places) else [1.0] * len(places)
