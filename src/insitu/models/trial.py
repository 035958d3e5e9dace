"""Runs of a model on a few tokens, to find out by value what its shapes do not tell.

What a run is for is decided elsewhere. Here is what such runs have in common: values are compared
to rounding, and the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from insitu.graph.structure import map_structure

_ABSENT = object()


@contextmanager
def undisturbed(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Lets the runs in it leave no trace: not in the model, and not in the random state.

    No graph for autograd is recorded. The user's hooks are set aside by who has the model in use.

    Args:
        modules: the model's tree, by path. The caller holds it (see `exclusive`).
    """
    parts = set(modules.values())
    tensors = [(buffer, buffer.clone()) for buffer in modules[""].buffers()]
    devices = {tensor.device for tensor in modules[""].parameters() if tensor.is_cuda}
    tables = [vars(part) for part in parts]
    for part in parts:
        tables.extend(table for table in vars(part).values() if isinstance(table, dict))
    states = [(table, dict(table)) for table in tables]
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            yield
    finally:
        for table, before in states:
            _restore(table, before)
        for buffer, before in tensors:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def alike(found: Any, expected: Any) -> bool:
    """Returns whether two values are equal to rounding; what is no number must be so in both.

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
    # Infinities, and the least number that there is in masks, say nothing about the scale.
    plain = other.abs() < torch.finfo(other.dtype).max / 2
    same = (mine == other) | (mine.isnan() & other.isnan())
    if not bool((same | plain).all()):
        return False
    scale = other[plain].abs().amax().clamp_min(1e-6) if bool(plain.any()) else 0.0
    limit = 1e-4 if other.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((same | ((mine - other).abs() <= limit * scale)).all())


def _restore(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Undoes what was done to a table. Other threads may be reading what has not changed."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key, _ABSENT) is not value:
            now[key] = value
    if list(now) != list(before):
        now.clear()
        now.update(before)
