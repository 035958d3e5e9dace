"""Logits only where they are read: most of what a small model computes is logits nobody reads."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from insitu.batching.pass_plan import PassPlan
from insitu.engine.interpose import Own, tapped


def unembedding(
    head: nn.Module | None, single: PassPlan, is_own: Own
) -> AbstractContextManager[None]:
    """Returns a context in which a model unembeds only the positions that a pass needs.

    Args:
        head: the module that makes logits `(rows, position, vocabulary)` of hidden states.
        single: the pass.
        is_own: whether it is the model's forward that calls the head.
    """
    if single.logits is None or head is None:
        return _WHOLE
    rows = tuple(row.rows for row in single.rows)
    return _choosing(head, _positions(single.logits.positions, rows), is_own)


@lru_cache(64)  # a loop runs the same passes again and again
def _positions(positions: Sequence[Sequence[int]], rows: Sequence[int]) -> torch.Tensor:
    """The positions of each row of a batch, `(rows, positions)`.

    A row that has fewer than others repeats its last.
    """
    most = max(map(len, positions))
    filled = [[*own, *[own[-1] if own else 0] * (most - len(own))] for own in positions]
    index = [own for own, repeats in zip(filled, rows, strict=True) for _ in range(repeats)]
    return torch.tensor(index)


_WHOLE = nullcontext()


@contextmanager
def _choosing(head: nn.Module, index: torch.Tensor, is_own: Own) -> Generator[None, None, None]:
    def choose(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Any) -> Any:
        hidden, *others = args
        rows = torch.arange(index.shape[0], device=hidden.device)[:, None]
        return (hidden[rows, index.to(hidden.device)], *others), kwargs

    with tapped(is_own) as taps:
        taps.before(head, choose)
        yield
