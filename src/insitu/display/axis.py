"""`Axis`: what one axis of some numbers runs over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """What one axis of some numbers runs over.

    Attributes:
        name: such as "layer", "head" or "position".
        labels: what each index stands for: "3", or a token.
    """

    name: str
    labels: tuple[str, ...]

    @classmethod
    def of(cls, name: str, labels: Iterable[object]) -> Axis:
        """Returns an axis whose labels are given as anything that can be printed.

        Args:
            name: its name.
            labels: such as `range(12)`.
        """
        return cls(name, tuple(map(str, labels)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice | list[int]) -> Axis:
        chosen = self.labels[index] if isinstance(index, slice) else [self.labels[i] for i in index]
        return Axis(self.name, tuple(chosen))
