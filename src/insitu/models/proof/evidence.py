"""The readings of a model that prove its names: values of runs, and what names stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from insitu.models.parts import Block
from insitu.models.proof.runs import Change, Runs, Seen, Tensor
from insitu.tracing.named import Named
from insitu.tracing.vocabulary import Entry, Given, Missing

if TYPE_CHECKING:
    from insitu.models.body import Body
    from insitu.models.vocabulary import Names

Reasons = dict[str, str]
"""Why names are refused, by the name on a block: "attention.z". Those that hold are not in it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was read of a model, and what makes further runs of it.

    Attributes:
        runs: makes runs of it, such that softmaxes can be seen.
        names: what its names would stand for, if all were given.
        body: what was found of its parts.
        entries: what the names on each block stand for, by path and by name: "attention.q".
        base: a run in which all of them were read.
        plain: such a run as the model itself would make it.
        rows: how many rows there are in these runs.
    """

    runs: Runs
    names: Names
    body: Body
    entries: Mapping[str, Mapping[str, Entry]]
    base: Seen
    plain: Seen
    rows: int

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.body.model.module.config

    def block(self, path: str) -> Block:
        """Returns what was found of a block."""
        return self.body.blocks()[path]

    def named(self, path: str, key: str) -> Named | None:
        """Returns where the value of a name stands, None if the name is not there."""
        entry = self.entries[path].get(key)
        return entry if isinstance(entry, Named) else None

    def value(self, path: str, key: str, seen: Seen | None = None) -> Tensor | None:
        """Returns the value of a name as it is shown, None if it is not there."""
        named = self.named(path, key)
        return None if named is None else (seen or self.base).at(named)

    def weight(self, path: str, key: str) -> Tensor | None:
        """Returns weights by their name, None if they are not there."""
        entry = self.entries[path].get(key)
        return entry.value if isinstance(entry, Given) else None

    def positions(self, path: str) -> int | None:
        """Returns how many positions the hidden states of a block have, None if they have none.

        That is where they are `(batch, position, d_model)`, or several of these in one.
        """
        returned = self.plain.places.get((path, "output", 0))
        hidden = returned[0] if isinstance(returned, tuple) and returned else returned
        if not isinstance(hidden, torch.Tensor) or hidden.ndim not in (3, 4):
            return None
        lengths = self.body.lengths
        if hidden.ndim == 4 and hidden.shape[1] == self.rows and hidden.shape[2] in lengths:
            return hidden.shape[2]
        return hidden.shape[1] if hidden.shape[0] == self.rows else None

    def changed(self, path: str, changes: Mapping[str, Change], *keys: str) -> Seen:
        """Makes a run in which some values of a block are others.

        Args:
            path: the block's path.
            changes: functions that change values, by the values' names.
            keys: the names of the values that are read in it.
        """
        found = {self.named(path, key): change for key, change in changes.items()}
        reads = [named for key in keys if (named := self.named(path, key)) is not None]
        return self.runs.run(reads, {named: c for named, c in found.items() if named is not None})


def is_there(entry: Entry | None) -> bool:
    """Returns whether a name stands for something."""
    return entry is not None and not isinstance(entry, Missing)


def sizes(value: Tensor) -> str:
    """Returns a tensor's shape, as it is written."""
    return str(tuple(value.shape))


def same_everywhere(value: Tensor) -> Tensor:
    """Returns what a value would be if it were the same for all rows and positions."""
    return value[:1, :1].expand_as(value)


def noise(like: Tensor, seed: int = 0) -> Tensor:
    """Returns random numbers in the form of a tensor, the same each time."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=draw).to(like)
