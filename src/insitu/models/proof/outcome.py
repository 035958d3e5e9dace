"""What a proof has shown: plain data, which says nothing of how it was made.

It stands apart from the making, so that a model whose proofs ship loads no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from insitu.models.parts import Block
    from insitu.models.wrapped_module import WrappedModule


@dataclass(frozen=True, slots=True)
class Proof:
    """Which names hold in a model.

    Attributes:
        blocks: why names are refused, by the kind of a block: see `signature.py`. A kind that is
            not in it was not proven.
        whole: why names of the model itself are.
        stacks: which list of blocks has which name, by its number.
        showing: how the model has to run for its softmaxes to be seen.
    """

    blocks: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    whole: Mapping[str, str] = field(default_factory=dict[str, str])
    stacks: Mapping[str, int] = field(default_factory=dict[str, int])
    showing: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Proven(Protocol):
    """What was proven of a model's parts: see `proof/given.py`."""

    def applied(self, block: Block, kind: str) -> Block:
        """Returns a block without its refused names.

        Args:
            block: what was found of it.
            kind: the kind of the block: see `proof/signature.py`.
        """
        ...

    def of_whole(self) -> Mapping[str, str] | str:
        """Returns why names of the model itself are refused; or why none could be proven."""
        ...

    def stack(self, name: str) -> int | str | None:
        """Returns which list of blocks has a name; why none has, None if there is none.

        Args:
            name: "blocks" or "encoder_blocks".
        """
        ...

    def small(self) -> WrappedModule | str:
        """Returns a small random model of the class, with as many blocks; or why there is none."""
        ...

    def showing(self) -> Mapping[str, Any] | None:
        """Returns with which options the model was proven, None if it was not."""
        ...
