"""Which operations return views of what they are given, and which only where strides allow it."""

from __future__ import annotations

from typing import Any, cast

from insitu.graph.node import Ref
from insitu.graph.operations import (
    ATTRIBUTE,
    GETITEM,
    REPLACE,
    SKIP,
    WRITE,
    Operation,
)
from insitu.graph.structure import is_basic

VIEWS = frozenset(
    (
        *("adjoint", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_to", "chunk", "detach"),
        *("diagonal", "dsplit", "expand", "expand_as", "hsplit", "imag", "moveaxis", "movedim"),
        *("narrow", "permute", "pos", "positive", "real", "select", "split", "split_with_sizes"),
        *("squeeze", "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind"),
        *("unflatten", "unfold", "unsqueeze", "view", "view_as", "view_as_complex"),
        *("view_as_real", "vsplit"),
    )
)
# Strides or the dtype decide whether these return a view or a copy.
SOMETIMES_VIEWS = frozenset(
    (
        *("apply", "bfloat16", "bool", "byte", "char", "cond", "contiguous", "cpu", "cuda", "fold"),
        *("alpha_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d"),  # in eval mode
        *("feature_alpha_dropout", "feature_dropout", "broadcast_tensors", "meshgrid"),
        *("conj", "conj_physical", "double", "einsum", "flatten", "float", "half", "int", "long"),
        *("ravel", "reshape", "reshape_as", "short", "sum_to_size", "to", "type_as"),
    )
)
_VIEW_ATTRIBUTES = frozenset(["H", "T", "imag", "mH", "mT", "real"])
_NO_VIEW_ATTRIBUTES = frozenset(["device", "dtype", "ndim", "shape"])
# `Tensor.unfold` returns a view, `torch.nn.functional.unfold` and `fold` do not.
_NEVER_VIEWS = frozenset(["functional.unfold"])

_HANDING_ON = (ATTRIBUTE, GETITEM, REPLACE, SKIP, WRITE)


def is_view(operation: Operation, args: tuple[Any, ...]) -> bool | None:
    """Returns whether an operation returns a view, None where strides or dtypes decide that.

    Args:
        operation: the operation.
        args: its encoded arguments.
    """
    if operation is ATTRIBUTE:
        if args[1] in _VIEW_ATTRIBUTES:
            return True
        return False if args[1] in _NO_VIEW_ATTRIBUTES else None
    if operation is GETITEM:
        # A whole number that the run computes takes an entry, which is a view.
        return is_basic(args[1]) or (None if _is_computed(args[1]) else False)
    if operation.name in _NEVER_VIEWS:
        return False
    return operation.short in VIEWS or (None if operation.short in SOMETIMES_VIEWS else False)


def may_be_view(operation: Operation) -> bool:
    """Returns whether an operation may hand on the memory of its inputs, for any strides."""
    return operation in _HANDING_ON or operation.short in VIEWS | SOMETIMES_VIEWS


def _is_computed(key: Any) -> bool:
    """Whether a key has values of the run in it, and nothing else that makes a copy."""
    parts = cast("tuple[Any, ...]", key) if isinstance(key, tuple) else (key,)
    return all(type(part) is Ref or is_basic(part) for part in parts)
