"""`handle.ops`: the torch functions that a module's own forward calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from insitu.batching.procedure import Subject
from insitu.engine.functions import Called
from insitu.graph.errors import IndexOutOfRangeError, PathError, nearest
from insitu.graph.location import here
from insitu.graph.node import SEPARATOR, readable
from insitu.graph.shapes import shape_of
from insitu.habits import OF_FUSED, habit
from insitu.tracing.sites import Sites

_FUSED = "scaled_dot_product_attention"  # one function for all of attention


class Calls:
    """The calls of one torch function: `handle.ops.softmax[0].output`.

    They count over all calls of the module in a forward, or in a step, from 0.
    """

    def __init__(self, sites: Callable[[int], Sites], written: str, count: int | None) -> None:
        self._sites = sites
        self._written = written
        self._count = count

    def __getitem__(self, number: int) -> Sites:
        count = self._count
        if count is not None and -count <= number < 0:
            number += count
        if number < 0 or (count is not None and number >= count):
            raise IndexOutOfRangeError(
                f"`{self._written}` is called {count} times, so there is no "
                f"`{self._written}[{number}]`.",
                here(),
            )
        return self._sites(number)

    def __len__(self) -> int:
        return self._count or 0

    def __iter__(self) -> Iterator[Sites]:
        return iter([self._sites(number) for number in range(len(self))])


class Operations:
    """The torch functions that a module's own forward calls, in their order, with shapes.

    `print(handle.ops)` lists them; `handle.ops.softmax[0]` has `.output`, `.input` and `.inputs`,
    to read and to write. What they are is found in a run on fake tensors.
    """

    def __init__(self, model: Subject, path: str, called: Sequence[Called] | None) -> None:
        self._model = model
        self._path = path
        self._called = called

    def __getattr__(self, name: str) -> Calls:
        if name.startswith("_"):
            raise AttributeError(name)
        count = None
        if self._called is not None:
            names = [called.name for called in self._called]
            count = names.count(name)
            if not count:
                listed = ", ".join(map(repr, dict.fromkeys(names)))
                close = habit(name, OF_FUSED) if _FUSED in names else ""
                close = (
                    close or nearest(name, names) or (f" (it calls: {listed})" if listed else "")
                )
                raise PathError(
                    f"The forward of `{readable(self._path)}` calls no {name!r}{close}.", here()
                )

        def sites(number: int) -> Sites:
            return Sites(self._model, f"{self._path}{SEPARATOR}{name}", number)

        return Calls(sites, f"{readable(self._path)}.ops.{name}", count)

    def __len__(self) -> int:
        return len(self._called or ())

    def __iter__(self) -> Iterator[Called]:
        return iter(self._called or ())

    def __dir__(self) -> list[str]:
        return sorted({called.name for called in self._called or ()})

    def __repr__(self) -> str:
        seen: dict[str, int] = {}
        lines: list[str] = []
        for called in self._called or ():
            number = seen.get(called.name, 0)
            seen[called.name] = number + 1
            lines.append(f"{called.name}[{number}]: {shape_of(called.output)}")
        return "\n".join(lines)
