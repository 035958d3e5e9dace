"""Weights as they are read by a standard name: tensors that refuse to be written into.

Some are views of a parameter, and others are cut out of one. A write would change the model for
good, or change nothing, and the name does not tell which. Results of computations with such a
tensor are plain tensors; a view of it refuses as it does.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from insitu.graph.errors import OperationError
from insitu.graph.location import here
from insitu.graph.structure import storage_of

_WRITES = frozenset(["__setitem__", "__set__", "__delete__"])


class ReadOnly(torch.Tensor):
    """A tensor that is there to be read. Values computed with it are plain `torch.Tensor`s."""

    _plain: torch.Tensor
    _instead: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Computes with plain tensors, where nothing is written into one of these."""
        kwargs = kwargs or {}
        if args and _writes(func, kwargs):
            refuse_write(args[0])
        refuse_write(kwargs.get("out"))
        return _computed(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Does the same within `torch.vmap` and the like, which pass by `__torch_function__`."""
        kwargs = kwargs or {}
        for place, one in enumerate(func._schema.arguments):
            if one.alias_info is not None and one.alias_info.is_write:
                refuse_write(args[place] if place < len(args) else kwargs.get(one.name))
        return _computed(func, args, kwargs)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return copy.deepcopy(self._plain, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self._plain).__reduce_ex__(protocol)


def _augmented(self: ReadOnly, other: Any) -> Any:
    """Refuses `weight += x`, where torch would take the error for a reason to compute `+`."""
    refuse_write(self)


for _name in (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
):
    setattr(ReadOnly, f"__i{_name}__", _augmented)


def read_only(value: torch.Tensor, instead: str) -> torch.Tensor:
    """Returns a tensor in the same memory that refuses to be written into.

    Args:
        value: the tensor. One of a class of its own, such as a quantised one, is returned as it is.
        instead: what the error for a write says: where to write in its place.
    """
    if type(value) is not torch.Tensor:
        return value
    found = value.as_subclass(ReadOnly)
    found._plain, found._instead = value, instead
    return found


def writable(value: Any) -> Any:
    """Returns the plain tensor of one that is read only, and any other value as it is."""
    return value._plain if type(value) is ReadOnly else value


def _writes(func: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch writes into its first argument."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or kwargs.get("inplace") is True


def refuse_write(target: Any) -> None:
    """Raises if the target of a write is read only, or has a part that is.

    Args:
        target: what would be written into.

    Raises:
        OperationError: saying where to write instead.
    """
    if type(target) is ReadOnly:
        raise OperationError(target._instead, here())
    if isinstance(target, list | tuple):
        for one in cast("Sequence[Any]", target):
            refuse_write(one)


def _computed(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function gives for plain tensors. Views of those that are read only are so too."""
    found: list[ReadOnly] = []
    plain = [_unwrapped(arg, found) for arg in args]
    named = {name: _unwrapped(arg, found) for name, arg in kwargs.items()}
    return _wrapped(func(*plain, **named), found)


def _unwrapped(value: Any, found: list[ReadOnly]) -> Any:
    """An argument with plain tensors in the place of these, which are added to a list."""
    if type(value) is ReadOnly:
        found.append(value)
        return value._plain
    if type(value) in (list, tuple):
        return type(value)([_unwrapped(one, found) for one in value])
    if type(value) is dict:
        return {name: _unwrapped(one, found) for name, one in cast("Any", value).items()}
    return value


def _wrapped(value: Any, found: Sequence[ReadOnly]) -> Any:
    """A result in which views of tensors that are read only are so too."""
    if type(value) is torch.Tensor:
        for one in found:
            if _share_memory(value, one._plain):
                return read_only(value, one._instead)
    elif type(value) in (list, tuple):
        return type(value)([_wrapped(one, found) for one in value])
    return value


def _share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    try:
        return storage_of(first) == storage_of(second)
    except (NotImplementedError, RuntimeError):  # sparse, or inside of a transform of `torch.func`
        return False
