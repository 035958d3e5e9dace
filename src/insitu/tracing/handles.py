"""Lists of handles, such as `model.blocks` and `model.transformer.h[1:3]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn, SupportsIndex, TypeVar, overload

from insitu.graph.errors import IndexOutOfRangeError, PathError
from insitu.graph.location import here

Kind = TypeVar("Kind")


class Handles(list[Kind]):
    """Handles of modules of one kind, such as `model.blocks`.

    Args:
        name: how they are written, such as `model.blocks[1:3]`.
        handles: the handles.
    """

    def __init__(self, name: str, handles: Iterable[Kind]) -> None:
        super().__init__(handles)
        self._name = name

    @overload
    def __getitem__(self, key: SupportsIndex) -> Kind: ...
    @overload
    def __getitem__(self, key: slice) -> Handles[Kind]: ...
    def __getitem__(self, key: SupportsIndex | slice) -> Kind | Handles[Kind]:
        try:
            if isinstance(key, slice):
                return Handles(sliced(self._name, key), super().__getitem__(key))
            return super().__getitem__(key)
        except IndexError:
            raise IndexOutOfRangeError(
                f"`{self._name}` has {len(self)} entries, so there is no `{self._name}[{key}]`.",
                here(),
            ) from None

    if not TYPE_CHECKING:  # to checkers, what is not declared is not there

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):  # a question of Python's or of a notebook's
                raise AttributeError(name)
            raise PathError(
                f"`{self._name}` is a list of modules and has no `{name}`: write "
                f"`{self._name}[0].{name}` for one of them, or "
                f"`[block.{name} for block in {self._name}]`.",
                here(),
            )


def sliced(name: str, key: slice) -> str:
    """Returns a slice of a list as it is written.

    Args:
        name: how the list is written.
        key: the slice.
    """
    bounds = (key.start, key.stop) if key.step is None else (key.start, key.stop, key.step)
    return f"{name}[{':'.join('' if bound is None else str(bound) for bound in bounds)}]"
