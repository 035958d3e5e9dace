"""How far a run has come, told after each of its passes to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from insitu.batching.summary import Summary
from insitu.display.progress import passes as listener


def following(passes: Sequence[Summary]) -> Callable[[int], None] | None:
    """Returns what is told of each pass that is done, by its number; None if nobody listens.

    Args:
        passes: what those of a run do, of which none is done.
    """
    listening = listener.get()
    if listening is None:
        return None
    costs = [1.0] if len(passes) == 1 else _costs(passes)
    total, so_far = sum(costs), 0.0

    def done(at: int) -> None:
        nonlocal so_far
        so_far += costs[at]
        listening(so_far, total)

    listening(0.0, total)
    return done


def _costs(summaries: Sequence[Summary]) -> list[float]:
    """What each pass costs beside the others."""
    if all(single.flops for single in summaries):
        return [single.flops for single in summaries]
    places = [single.rows * single.positions * single.run for single in summaries]
    return [float(place) for place in places] if all(places) else [1.0] * len(places)
