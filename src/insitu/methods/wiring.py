"""Wiring: what adds to the residual stream of a model, and what reads from it, in their order.

This is the graph whose edges are attributed and removed: from each thing that adds to the stream
to everything that reads the stream later. Which there are in a model is found in `survey.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from insitu.methods.sites import Site
from insitu.models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class Receiver:
    """Something that is made of the residual stream.

    Attributes:
        name: "a3.q5", "a3.k1", "a3", "m3" or "logits".
        site: where it is; None of the logits.
        head: which head of that; None for all of it.
    """

    name: str
    site: Site | None
    head: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Some senders of a part, and those of its receivers that they depend on.

    Attributes:
        receivers: their numbers in the part.
        senders: their numbers in the part.
    """

    receivers: tuple[int, ...]
    senders: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a block: attention, an MLP, a state-space layer; or, at the end, the logits.

    Attributes:
        layer: the number of the block.
        reads: where it reads the residual stream.
        gives: what it adds to it, "result" if that is told by heads; None of the logits.
        receivers: the values that it makes of the stream.
        senders: the names of what it adds to the stream.
        groups: which of them depend on which receivers.
        upstream: how many senders there are before what it reads.
        first_receiver: the number that its first receiver has in the model.
        first_sender: the number that its first sender has in the model.
    """

    layer: int
    reads: Site
    gives: Site | None
    receivers: tuple[Receiver, ...]
    senders: tuple[str, ...]
    groups: tuple[Group, ...]
    upstream: int
    first_receiver: int
    first_sender: int

    @property
    def by_heads(self) -> bool:
        """Whether its receivers are queries, keys and values of heads."""
        return self.receivers[0].head is not None

    def added(self, model: LanguageModel) -> Any:
        """Returns what its senders add, `(row, sender, position, d_model)`, in an invocation."""
        assert self.gives is not None
        value = self.gives.read(model, self.layer)
        return value if "head" in self.gives.axes else value.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a model consists of, and how that is connected.

    Each receiver reads what the first senders have added to the stream, up to where it stands.

    Attributes:
        parts: the parts of its blocks, in order, and the logits.
    """

    parts: tuple[Part, ...]

    @property
    def senders(self) -> list[str]:
        """The names of all that adds to the residual stream, in order: "input", "a0.h0", ..."""
        return ["input", *(name for part in self.parts for name in part.senders)]

    @property
    def receivers(self) -> list[str]:
        """The names of all that reads it, in order: "a0.q0", ..., "m0", ..., "logits"."""
        return [receiver.name for part in self.parts for receiver in part.receivers]

    def edges(self) -> torch.Tensor:
        """Returns which senders each receiver reads, as booleans `(sender, receiver)`."""
        there = torch.zeros(len(self.senders), len(self.receivers), dtype=torch.bool)
        for part in self.parts:
            first = part.first_receiver
            there[: part.upstream, first : first + len(part.receivers)] = True
        return there

    def connected(self, kept: torch.Tensor) -> torch.Tensor:
        """Returns those of some edges that lie on a way from the input to the logits.

        Args:
            kept: the edges, `(sender, receiver)`.
        """
        reached = torch.zeros(len(self.senders), dtype=torch.bool)
        reached[0] = True
        for part in self.parts:
            for receivers, senders in _numbers(part):
                reached[senders] = bool((kept[:, receivers] & reached[:, None]).any())
        leads = torch.zeros(len(self.receivers), dtype=torch.bool)
        leads[-1] = True
        for part in reversed(self.parts):
            for receivers, senders in _numbers(part):
                if senders:
                    leads[receivers] |= bool((kept[senders] & leads).any())
        return kept & reached[:, None] & leads


def _numbers(part: Part) -> list[tuple[list[int], list[int]]]:
    """The groups of a part, by the numbers that receivers and senders have in the model."""
    return [
        (
            [part.first_receiver + number for number in group.receivers],
            [part.first_sender + number for number in group.senders],
        )
        for group in part.groups
    ]
