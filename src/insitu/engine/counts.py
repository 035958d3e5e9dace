"""What a computation takes: floating-point operations and memory."""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """What a computation takes.

    Attributes:
        flops: floating-point operations.
        peak: the most bytes of values that it made and that were there at once.
        made: the bytes of all values that it made. Autograd may keep all of them.
        left: the bytes of those that were there at the end.
    """

    flops: float
    peak: int
    made: int
    left: int
