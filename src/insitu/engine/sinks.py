"""Where saved values go the moment they are final: a `Sink`, in memory or anywhere else."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol


class SaveKey(NamedTuple):
    """Which saved value something is.

    Attributes:
        name: the name that it is saved by. A value without one has the number of its place among
            the saved values of the job, or of the block where that is no job.
        block: which block of the job or session it is of, from 0.
        invocation: the invocation that it is computed of, None if of several or of none.
        step: for a value that is saved in every step, which of them, from 0; else None.
    """

    name: str
    block: int = 0
    invocation: int | None = None
    step: int | None = None


class Sink(Protocol):
    """Takes saved values."""

    def save(self, key: SaveKey, value: Any) -> None:
        """Takes a value that is final. The run keeps none of it.

        It is called once for each key, in the thread of the run and while the model is in use: so
        it runs no model. What it raises ends the run.

        Args:
            key: which value it is.
            value: the value, in the structure that it has in the run, in memory of its own.
        """
        ...


class MemorySink:
    """Keeps saved values in memory.

    Attributes:
        values: the values, by their keys, in the order in which they came.

    Example:
        >>> sink = MemorySink()
        >>> sink.save(SaveKey("logits"), 1)
        >>> sink.by_name()
        {'logits': 1}
    """

    def __init__(self) -> None:
        self.values: dict[SaveKey, Any] = {}

    def save(self, key: SaveKey, value: Any) -> None:
        """Takes a value."""
        self.values[key] = value

    def by_name(self) -> dict[str, Any]:
        """Returns the values by name, those of every step as a list: as `Results` have them."""
        found: dict[str, Any] = {}
        for key, value in sorted(self.values.items(), key=lambda item: item[0].step or 0):
            if key.step is None:
                found[key.name] = value
            else:
                found.setdefault(key.name, []).append(value)
        return found
