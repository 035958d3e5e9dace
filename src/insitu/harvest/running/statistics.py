"""Statistics of a shard, made on the way: sums that give means, norms and variances."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from insitu.harvest.layout import NORM_SUM, SQUARE_SUM, SUM
from insitu.harvest.specification import Specification

# Torch computes on so few numbers in the thread itself. More would wake threads that wait for the
# processors that the model runs on.
_TOGETHER = 32_000


def with_statistics(
    told: Specification, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Returns the tensors of a shard with the statistics of its dense sites.

    Args:
        told: the specification of the harvest.
        tensors: what was run.
    """
    dense = [site.label for site in told.sites if site.features is None]
    return {**tensors, **statistics_of({label: tensors[label] for label in dense})}


def statistics_of(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the statistics of sites by their names in a shard, float64.

    Args:
        values: `(row, ...)` of each dense site, by label.
    """
    made = dict[str, torch.Tensor]()
    for label, rows in values.items():
        total = torch.zeros(rows.shape[1:], dtype=torch.float64)
        norms = torch.zeros((), dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        step = max(1, _TOGETHER // max(1, rows[:1].numel()))
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double()
            total += part.sum(0)
            each = part.flatten(1).square().sum(1) if part.ndim > 1 else part.square()
            norms += each.sqrt().sum()
            squares += each.sum()
        made[f"{label}/{SUM}"] = total
        made[f"{label}/{NORM_SUM}"] = norms
        made[f"{label}/{SQUARE_SUM}"] = squares
    return made
