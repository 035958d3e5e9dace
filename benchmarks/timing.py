"""Fair comparisons on a noisy machine: cases interleaved in shuffled order, and medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    cases: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 5,
    before: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Returns the median time of each case, in microseconds.

    Every round runs every case once, each round in a new order: in a fixed order, what runs
    before a case biases it by 2 to 3%.

    Args:
        cases: what to run.
        rounds: how often.
        warm_up: rounds before those.
        before: is called before each run, outside of the time that is taken.
    """
    order = list(cases)
    times: dict[str, list[float]] = {name: [] for name in order}
    rng = random.Random(0)
    for number in range(rounds + warm_up):
        rng.shuffle(order)
        for name in order:
            if before is not None:
                before()
            start = time.perf_counter()
            cases[name]()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) * 1e6 for name, found in times.items()}
