"""Logits only where they are read: most of what a small model computes is logits nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from insitu.engine.interpose import Own, tapped
from insitu.graph.node import Place


class Unembedded(NamedTuple):
    """Which positions of a forward become logits, where not all of them do.

    Attributes:
        places: where there are only these positions then.
        positions: those of each invocation in the batch.
        index: those of each row of the batch, `(rows, positions)`: a row that has fewer than
            others repeats its last. None if all become logits.
    """

    places: frozenset[Place]
    positions: Sequence[Sequence[int]]
    index: torch.Tensor | None

    @property
    def count(self) -> int:
        """How many positions of each row become logits."""
        return 0 if self.index is None else self.index.shape[1]


ALL_UNEMBEDDED = Unembedded(frozenset(), (), None)


def unembed_only(
    places: frozenset[Place], positions: Sequence[Sequence[int]], rows: Sequence[int]
) -> Unembedded:
    """Returns what says that only some positions become logits.

    Args:
        places: where there are only these positions then.
        positions: those of each invocation, at least one in all.
        rows: how many rows each invocation has.
    """
    count = max(len(own) for own in positions)
    filled = [[*own, *[own[-1] if own else 0] * (count - len(own))] for own in positions]
    index = [own for own, repeats in zip(filled, rows, strict=True) for _ in range(repeats)]
    return Unembedded(places, positions, torch.tensor(index))


def unembedding(
    head: nn.Module | None, unembedded: Unembedded, is_own: Own
) -> AbstractContextManager[None]:
    """Returns a context in which a model unembeds only these positions.

    Args:
        head: the module that makes logits `(rows, position, vocabulary)` of hidden states.
        unembedded: which positions.
        is_own: whether it is the model's forward that calls the head.
    """
    if unembedded.index is None or head is None:
        return _WHOLE
    return _choosing(head, unembedded.index, is_own)


_WHOLE = nullcontext()


@contextmanager
def _choosing(head: nn.Module, index: torch.Tensor, is_own: Own) -> Iterator[None]:
    def choose(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: Any) -> Any:
        hidden, *others = args
        rows = torch.arange(index.shape[0], device=hidden.device)[:, None]
        return (hidden[rows, index.to(hidden.device)], *others), kwargs

    with tapped(is_own) as taps:
        taps.before(head, choose)
        yield


def take_logits(
    value: Any, layout: Any, logits: Callable[[Any, Any], Any], others: Callable[[Any, Any], Any]
) -> Any:
    """Returns a prompt's part of a value in which not all positions have become logits.

    Args:
        value: the logits, or what the whole model returns, with whatever it was asked for besides.
        layout: its layout.
        logits: gives the prompt's part of logits, with their layout.
        others: gives its part of other values.
    """
    if not isinstance(layout, dict) or not isinstance(value, dict) or layout.keys() != value.keys():
        return logits(value, layout)
    kind: Any = type(value)
    return kind(
        {
            name: (logits if name == "logits" else others)(value[name], inner)
            for name, inner in layout.items()
        }
    )
