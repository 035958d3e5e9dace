"""Numbers with names and labels, in the text format of Prometheus, without a package for it."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Buckets for times."""

ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
"""Buckets for rows of batches."""


class Family:
    """Numbers with one name.

    Args:
        name: the name.
        help: what it is, in a line.
        labels: the names of the labels that each number has.
    """

    kind = "untyped"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a metric")
        for label in labels:
            if not _LABEL.fullmatch(label) or label == "le":
                raise ValueError(f"{label!r} is no name of a label")
        self.name, self.help, self.labels = name, help, tuple(labels)

    def text(self) -> str:
        """Returns the family as Prometheus reads it."""
        lines = [f"# HELP {self.name} {_escaped(self.help)}", f"# TYPE {self.name} {self.kind}"]
        lines += self._samples()
        return "".join(f"{line}\n" for line in lines)

    def _samples(self) -> Iterator[str]:
        yield from ()

    def _key(self, given: dict[str, str]) -> tuple[str, ...]:
        if given.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, and not {(*given,)}")
        return tuple(str(given[label]) for label in self.labels)

    def _line(self, ending: str, key: Sequence[str], value: float, *more: tuple[str, str]) -> str:
        pairs = [*zip(self.labels, key, strict=True), *more]
        inner = ",".join(f'{label}="{_escaped(one, quotes=True)}"' for label, one in pairs)
        return f"{self.name}{ending}{f'{{{inner}}}' if inner else ''} {_number(value)}"


class Counter(Family):
    """Numbers that only grow. Its name ends in `_total`."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self._values = dict[tuple[str, ...], float]()

    def add(self, amount: float = 1.0, /, **labels: str) -> None:
        """Adds to one of the numbers.

        Args:
            amount: how much, which is not below 0.
            labels: which one: a value for each label.

        Raises:
            ValueError: for other labels, and for an amount below 0.
        """
        if not amount >= 0:
            raise ValueError(f"{self.name} cannot grow by {amount}")
        key = self._key(labels)
        self._values[key] = self._values.get(key, 0.0) + amount

    def value(self, **labels: str) -> float:
        """Returns one of the numbers, 0 if nothing was added to it."""
        return self._values.get(self._key(labels), 0.0)

    def _samples(self) -> Iterator[str]:
        for key, value in self._values.items():
            yield self._line("", key, value)


class Gauge(Family):
    """Numbers that are what they are now."""

    kind = "gauge"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self._values = dict[tuple[str, ...], float]()

    def set(self, value: float, /, **labels: str) -> None:
        """Sets one of the numbers.

        Args:
            value: the number.
            labels: which one.

        Raises:
            ValueError: for other labels.
        """
        self._values[self._key(labels)] = value

    def value(self, **labels: str) -> float:
        """Returns one of the numbers, 0 if it was not set."""
        return self._values.get(self._key(labels), 0.0)

    def clear(self) -> None:
        """Forgets all numbers, before those that there are now are set."""
        self._values.clear()

    def _samples(self) -> Iterator[str]:
        for key, value in self._values.items():
            yield self._line("", key, value)


class Histogram(Family):
    """How often numbers of some sizes were seen.

    Args:
        name: as of `Family`, as are the next two.
        help: the same.
        labels: the same.
        buckets: the sizes, each with those that are smaller. A last one for all is added.
    """

    kind = "histogram"

    def __init__(
        self, name: str, help: str, labels: Sequence[str] = (), buckets: Sequence[float] = SECONDS
    ) -> None:
        super().__init__(name, help, labels)
        if list(buckets) != sorted(set(buckets)) or not all(map(math.isfinite, buckets)):
            raise ValueError(f"the buckets of {name} do not grow")
        self.buckets = tuple(buckets)
        self._counts = dict[tuple[str, ...], list[int]]()
        self._sums = dict[tuple[str, ...], float]()

    def see(self, value: float, /, **labels: str) -> None:
        """Counts a number.

        Args:
            value: the number.
            labels: of what.

        Raises:
            ValueError: for other labels.
        """
        key = self._key(labels)
        counts = self._counts.setdefault(key, [0] * (len(self.buckets) + 1))
        # What is no number is in the last bucket alone, as it is not below anything.
        counts[len(self.buckets) if math.isnan(value) else bisect_left(self.buckets, value)] += 1
        self._sums[key] = self._sums.get(key, 0.0) + value

    def count(self, **labels: str) -> int:
        """Returns how many numbers were seen."""
        return sum(self._counts.get(self._key(labels), ()))

    def _samples(self) -> Iterator[str]:
        for key, counts in self._counts.items():
            seen = 0
            for bucket, count in zip((*self.buckets, math.inf), counts, strict=True):
                seen += count
                yield self._line("_bucket", key, seen, ("le", _number(bucket)))
            yield self._line("_sum", key, self._sums[key])
            yield self._line("_count", key, seen)


def text_of(metrics: object) -> str:
    """Returns the families that are attributes of something, as Prometheus reads them.

    Args:
        metrics: what has them.
    """
    return "".join(one.text() for one in vars(metrics).values() if isinstance(one, Family))


def _escaped(text: str, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
