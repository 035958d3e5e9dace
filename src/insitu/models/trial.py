"""Whether values of two runs of a model on a few tokens are the same, to rounding."""

from __future__ import annotations

from typing import Any

import torch

from insitu.graph.structure import map_structure


def alike(found: Any, expected: Any) -> bool:
    """Returns whether two values are equal to rounding; NaN must be so in both.

    Args:
        found: a value.
        expected: another. How far off numbers may be is relative to the largest of them.
    """
    pairs: list[list[Any]] = [[], []]
    for value, leaves in zip((found, expected), pairs, strict=True):
        map_structure(lambda leaf, leaves=leaves: leaves.append(leaf), value)
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(_alike(mine, other) for mine, other in zip(*pairs, strict=True))


def _alike(mine: Any, other: Any) -> bool:
    if not isinstance(other, torch.Tensor) or not isinstance(mine, torch.Tensor):
        return type(mine) is type(other) and bool(mine == other)
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return False
    if not other.is_floating_point():
        return torch.equal(mine, other)
    if other.numel() == 0:
        return True
    limit = 1e-4 if other.dtype in (torch.float32, torch.float64) else 3e-2
    largest = float(other.abs().amax())
    if largest < torch.finfo(other.dtype).max / 2:  # as nearly always: all are plain numbers
        return float((mine - other).abs().amax()) <= limit * max(largest, 1e-6)
    # Infinities, and the least number that there is in masks, say nothing about the scale.
    plain = other.abs() < torch.finfo(other.dtype).max / 2
    same = (mine == other) | (mine.isnan() & other.isnan())
    if not bool((same | plain).all()):
        return False
    scale = other[plain].abs().amax().clamp_min(1e-6) if bool(plain.any()) else 0.0
    return bool((same | ((mine - other).abs() <= limit * scale)).all())
