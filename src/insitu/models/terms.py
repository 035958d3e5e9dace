"""On which terms invocations share forwards of a language model: those of equal terms may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from insitu.batching.asked import NOTHING, Asked
from insitu.batching.layout import Layouts
from insitu.models.prompts import Prompt, Side


class Terms(NamedTuple):
    """What a pass is like that several invocations share.

    Attributes:
        number: equal for equal terms of a block.
        options: keyword arguments of the forward.
        layouts: how values are cut.
        side: where shorter prompts are padded.
        asked: what its invocations ask of it.
    """

    number: int
    options: Mapping[str, Any]
    layouts: Layouts
    side: Side
    asked: Asked

    @property
    def shares(self) -> bool:
        """Whether invocations of equal prompts may share what they have in common."""
        return self.asked == NOTHING


def sides_of(requests: Sequence[Prompt]) -> list[Side]:
    """Returns where each prompt of a block is padded in a batch.

    Prompts with padding before them need position ids, and then all in their batch have some.
    Several rows without padding share theirs when they are alone, and so have a batch of others.

    Args:
        requests: the prompts.
    """
    if all(prompt.positions is None for prompt in requests):
        return ["right"] * len(requests)
    return [
        "right" if prompt.positions is None and prompt.ids.shape[0] > 1 else "left"
        for prompt in requests
    ]
