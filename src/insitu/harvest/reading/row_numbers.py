"""Which rows an index means: a number, a slice, several numbers, or a mask."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import numpy as np
import torch

from insitu.graph.errors import IndexOutOfRangeError, OptionError
from insitu.graph.location import here

Numbers = np.ndarray[Any, np.dtype[np.int64]]
"""Numbers of rows, counted from 0, `(rows,)`."""


def numbers_of(given: Any, count: int) -> int | range | Numbers:
    """Returns the rows that an index means, counted from 0.

    Args:
        given: a number, a slice, a list, array or tensor of numbers, `(rows,)`, or a mask
            `(count,)`.
        count: how many rows there are.

    Raises:
        IndexOutOfRangeError: if there is no such row.
        OptionError: if it is no index of rows.
    """
    index = given
    if isinstance(index, slice):
        try:
            return range(count)[index]
        except (TypeError, ValueError):
            _refuse(index)
    if isinstance(index, range):
        index = np.arange(index.start, index.stop, index.step)
    if hasattr(index, "__index__") and not getattr(index, "ndim", 0):
        if isinstance(index, bool) or getattr(index, "dtype", None) in (torch.bool, np.bool_):
            _refuse(index)
        number = operator.index(index)
        if not -count <= number < count:
            raise IndexOutOfRangeError(f"There is no row {number}: there are {count}.", here())
        return number % count
    if isinstance(index, tuple | str | bytes | dict) or index is None or index is Ellipsis:
        _refuse(index)
    if isinstance(index, torch.Tensor):
        if index.dtype == torch.uint8:  # a mask to torch, and numbers to NumPy
            _refuse(index)
        index = index.detach().cpu().numpy()
    try:
        numbers = np.asarray(index)
    except (TypeError, ValueError, OverflowError):
        _refuse(index)
    if numbers.dtype == np.bool_:
        if numbers.shape != (count,):
            raise OptionError(
                f"A mask of rows has the shape ({count},), not {numbers.shape}.", here()
            )
        return np.flatnonzero(numbers)
    if numbers.shape == (0,):
        return np.empty(0, np.int64)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        _refuse(index)
    if numbers.min() < -count or numbers.max() >= count:
        wrong = numbers.min() if numbers.min() < -count else numbers.max()
        raise IndexOutOfRangeError(f"There is no row {wrong}: there are {count}.", here())
    numbers = numbers.astype(np.int64)
    return np.where(numbers < 0, numbers + count, numbers)


def _refuse(index: Any) -> NoReturn:
    shown = f"{index!r:.60}" if not hasattr(index, "shape") else f"one of shape {index.shape}"
    raise OptionError(
        "Rows are a number, a slice, a list of numbers or a mask of them, `(rows,)`, not "
        f"{shown}. Index what comes of it for a part of each row.",
        here(),
    )
