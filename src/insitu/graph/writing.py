"""What may be written to a site: a value of its structure, its shapes and its dtypes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch

from insitu.graph.bounds import check_entries, is_container
from insitu.graph.errors import OperationError, ShapeError
from insitu.graph.structure import fields_of, map_structure, tensors_of


def fitted(original: Any, value: Any, block: bool, move: bool = True) -> Any:
    """Returns a value as a site takes it: of the original's structure, on its device.

    Args:
        original: what arrived at the site.
        value: the value that is to stand there instead.
        block: whether the site is the output of a transformer block: then the first part alone, or
            the first parts, may be given.
        move: whether to put it on the original's device.

    Raises:
        ShapeError: if structure, shape or dtype are not those of the original.
    """
    if block:
        if not isinstance(value, tuple):  # nearly always the hidden states alone
            return (fitted(original[0], value, False, move), *original[1:])
        parts = cast("tuple[Any, ...]", value)
        value = (*parts, *original[len(parts) :])
    if isinstance(original, torch.Tensor):
        if not isinstance(value, torch.Tensor):
            raise ShapeError(
                f"a tensor of shape {tuple(original.shape)} stands there, not "
                f"{_described(value)}: make one with torch.full_like or torch.zeros_like"
            )
        if value.shape != original.shape:
            raise ShapeError(
                f"the shape there is {tuple(original.shape)}, and this is {tuple(value.shape)}"
            )
        if value.dtype != original.dtype:
            raise ShapeError(
                f"the dtype there is {original.dtype}, and this is {value.dtype}: convert it with "
                "`.to(...)`"
            )
        if not move or value.device == original.device:
            return value
        return value.to(original.device)
    if isinstance(original, Mapping):
        before = cast("Mapping[Any, Any]", original)
        if not isinstance(value, Mapping) or cast(Any, value).keys() != before.keys():
            raise ShapeError(
                f"a dictionary of {', '.join(map(repr, before))} stands there, not "
                f"{_described(value)}"
            )
        after = cast("Mapping[Any, Any]", value)
        kind = cast(Any, type(before))
        return kind({key: fitted(item, after[key], False, move) for key, item in before.items()})
    if isinstance(original, tuple | list):
        items = cast("list[Any]", original)
        if not isinstance(value, tuple | list) or len(cast(Any, value)) != len(items):
            raise ShapeError(
                f"a {type(items).__name__} of {len(items)} stands there, not {_described(value)}"
            )
        pairs = zip(items, cast("list[Any]", value), strict=True)
        return _of_kind(items, [fitted(item, other, False, move) for item, other in pairs])
    names = fields_of(original)
    if names:
        if type(value) is not type(original):
            raise ShapeError(f"{_described(original)} stands there, not {_described(value)}")
        new = {
            name: fitted(getattr(original, name), getattr(value, name), False, move)
            for name in names
        }
        return _with_fields(value, new)
    return value


def replaced(value: Any, key: Any, part: Any) -> Any:
    """Returns a tuple, list, dictionary or dataclass with one of its entries replaced.

    Raises:
        OperationError: if the value is a tensor: that would be a write in place.
        IndexError, KeyError: if there is no such entry.
        LimitError: if it grows too large.
    """
    made = _replaced(value, key, part)
    if is_container(part):
        check_entries(made)
    return made


def _replaced(value: Any, key: Any, part: Any) -> Any:
    if type(value) is tuple:  # nearly always
        items = list(cast("tuple[Any, ...]", value))
        items[key] = part
        return tuple(items)
    if isinstance(value, Mapping):
        entries = dict(cast("Mapping[Any, Any]", value))
        if key not in entries:
            raise KeyError(key)
        entries[key] = part
        kind = cast(Any, type(cast(Any, value)))
        return kind(entries)
    names = fields_of(value)
    if names and isinstance(key, str):
        if key not in names:
            raise KeyError(f"{type(value).__name__} has the fields {', '.join(names)}")
        if isinstance(value, tuple):
            return cast(Any, value)._replace(**{key: part})
        return _with_fields(value, {key: part})
    if isinstance(value, tuple | list):
        items = list(cast("list[Any]", value))
        items[key] = part
        return _of_kind(cast(Any, value), items)
    raise OperationError(f"a part of {_described(value)} cannot be replaced")


def standing_in(inputs: Any, value: Any) -> Any:
    """Returns what stands for the output of a module that does not run.

    Args:
        inputs: what the module was called with: its tensors tell the device.
        value: the value that is to stand there.
    """
    device = next((tensor.device for tensor in tensors_of(inputs)), None)

    def placed(item: Any) -> Any:
        return item if device is None or not isinstance(item, torch.Tensor) else item.to(device)

    return map_structure(placed, value)


def _with_fields(value: Any, new: Mapping[str, Any]) -> Any:
    """A copy of a dataclass with other fields; its `__init__` may want or do anything."""
    made = copy.copy(value)
    for name, part in new.items():
        object.__setattr__(made, name, part)  # also of a frozen one
    return made


def _of_kind(example: Any, items: list[Any]) -> Any:
    kind = cast(Any, type(example))
    if kind is list:
        return items
    return kind(*items) if hasattr(kind, "_fields") else kind(items)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        items = cast("list[Any]", value)
        return f"a {type(items).__name__} of {len(items)}"
    return f"a value of type {type(value).__name__}"
