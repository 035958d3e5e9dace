"""Statistics of a site over all rows, from the sums that each shard has of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from insitu.harvest.layout import NORM_SUM, SQUARE_SUM, SUM
from insitu.harvest.reading.mapped_shard import MappedShard


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of the rows of a site, in float64.

    Attributes:
        rows: of how many rows.
        mean: their mean, of the shape of one row.
        mean_norm: the mean of their Euclidean norms. What normalises activations for training is
            often `sqrt(width) / mean_norm`.
        covariance_trace: the trace of their covariance: the mean of the squared distance from
            the mean, divided by `rows` and not by `rows - 1`. It is what a reconstruction's error
            is a part of.
    """

    rows: int
    mean: torch.Tensor
    mean_norm: float
    covariance_trace: float

    def __repr__(self) -> str:
        return (
            f"<Statistics of {self.rows:,} rows: mean of norm {float(self.mean.norm()):.4g}, "
            f"mean norm {self.mean_norm:.4g}, trace of the covariance {self.covariance_trace:.4g}>"
        )


def statistics_of(
    shards: Iterable[MappedShard], label: str, shape: tuple[int, ...], rows: int
) -> Statistics:
    """Returns the statistics of a dense site.

    Args:
        shards: all shards.
        label: the site's label.
        shape: of one row.
        rows: how many rows there are, at least one.
    """
    total = torch.zeros(shape, dtype=torch.float64)
    norms = squares = 0.0
    for shard in shards:
        total += shard.tensor(f"{label}/{SUM}")
        norms += float(shard.tensor(f"{label}/{NORM_SUM}"))
        squares += float(shard.tensor(f"{label}/{SQUARE_SUM}"))
    mean = total / rows
    # Not below 0, where rows that are all alike leave nothing but rounding.
    trace = squares / rows - float(mean.square().sum())
    return Statistics(rows, mean, norms / rows, max(trace, 0.0) if trace == trace else trace)
