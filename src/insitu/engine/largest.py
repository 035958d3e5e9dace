"""How large results can be whose sizes depend on values: at most, and as values say."""

# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor


def largest(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Returns a result of the largest size that an operation can give, None if there is none.

    To be called where tensors without data are made.

    Args:
        name: the last part of the operation's name, such as "nonzero".
        args: its arguments, with tensors without data.
        kwargs: its keyword arguments.
    """
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    if not given:
        return None
    first = given[0]
    if name in ("nonzero", "argwhere"):
        rows = _new(first, (first.numel(), first.ndim), torch.int64)
        as_tuple = name == "nonzero" and kwargs.get("as_tuple", False)
        return rows.unbind(1) if as_tuple else rows
    if name == "masked_select" and len(given) > 1:
        shape = torch.broadcast_shapes(first.shape, given[1].shape)
        return _new(first, (shape.numel(),), first.dtype)
    if name == "getitem" and len(args) > 1:
        return first[_without_masks(args[1])]
    if name in ("unique", "unique_consecutive"):
        return _unique(first, args, kwargs)
    if name == "where" and len(args) + len(kwargs) == 1:
        return _new(first, (first.numel(), first.ndim), torch.int64).unbind(1)
    if name in ("cov", "corrcoef"):
        rows = first.reshape(1, -1) if first.ndim < 2 else first
        products = rows @ rows.mT
        return products.squeeze() if first.ndim < 2 else products
    if name == "lstsq" and len(given) > 1:
        return _least_squares(first, given[1])
    if name in ("allclose", "equal") and len(given) > 1:
        compare = torch.eq if name == "equal" else torch.isclose
        compare(first, given[1])  # what it takes
        return True
    return None


def asked(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Returns the bytes of a result whose size values decide alone, None if it is another one.

    Args:
        name: as of `largest`.
        args: the operation's arguments, with real tensors.
        kwargs: its keyword arguments.
    """
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    if not given or not given[0].numel():
        return None
    first = given[0]
    if name == "bincount":
        return 8 * max(_most(first) + 1, kwargs.get("minlength", 0), *_numbers(args))
    if name == "one_hot":
        return 8 * first.numel() * (_most(first) + 1)
    if name == "repeat_interleave" and len(given) == 1:
        return None if _numbers(args) else 8 * _sum(first)
    if name == "repeat_interleave":
        times = _sum(given[1])
        whole = first.numel() * first.element_size()
        dim = kwargs.get("dim", next(iter(_numbers(args)), None))
        return whole * times if dim is None else whole // max(first.shape[dim], 1) * times
    return None


def _new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _most(tensor: Tensor) -> int:
    return int(tensor.max())


def _sum(tensor: Tensor) -> int:
    return int(tensor.sum())


def _numbers(args: tuple[Any, ...]) -> list[int]:
    return [one for one in args if isinstance(one, int) and not isinstance(one, bool)]


def _without_masks(key: Any) -> Any:
    """A key with indices in the place of masks: as many as a mask of truths has."""
    parts = cast("tuple[Any, ...]", key if isinstance(key, tuple) else (key,))
    masks = [one for one in parts if _is_mask(one)]
    most = max((mask.numel() for mask in masks), default=0)
    made: list[Any] = []
    for part in parts:
        if _is_mask(part):
            made += [_new(part, (most,), torch.int64)] * part.ndim
        else:
            made.append(part)
    return tuple(made)


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def _least_squares(left: Tensor, right: Tensor) -> Any:
    """What `linalg.lstsq` gives, with all that it may leave empty."""
    torch.linalg.svd(left)  # what it takes
    solution = left.mT @ right.reshape(*left.shape[:-1], -1)
    residuals = _new(left, (*solution.shape[:-2], solution.shape[-1]), left.dtype)
    rank = _new(left, tuple(left.shape[:-2]), torch.int64)
    values = _new(left, (*left.shape[:-2], min(left.shape[-2:])), left.dtype)
    return cast(Any, torch.return_types).linalg_lstsq((solution, residuals, rank, values))


def _unique(first: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    dim = kwargs.get("dim")
    count = first.numel() if dim is None else first.shape[dim]
    values = _new(first, (count,) if dim is None else tuple(first.shape), first.dtype)
    if not (args[1:] or kwargs.keys() - {"dim", "sorted"}):
        return values
    inverse = _new(first, tuple(first.shape) if dim is None else (count,), torch.int64)
    return values, inverse, _new(first, (count,), torch.int64)
