"""Running on tensors without data."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch._subclasses import FakeTensorMode

from insitu.graph.changes import changing
from insitu.graph.ordinary import ordinary_tensors


class Fakes(FakeTensorMode):
    """Makes tensors without data: PyTorch's own mode, and what that does not know.

    Constants that a forward makes of its own are real tensors, and may be among them.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns the result of an operation."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)


def _grouped_product(
    left: torch.Tensor,
    right: torch.Tensor,
    offsets: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The shape of products of experts. PyTorch tells it of one dtype only."""
    shape = [left.shape[-2], right.shape[-1]]
    if left.ndim == right.ndim == 2:
        shape.insert(0, cast("torch.Tensor", offsets).shape[0])
    elif left.ndim == right.ndim == 3:
        shape.insert(0, left.shape[0])
    return left.new_empty(shape, dtype=out_dtype or left.dtype)


@contextmanager
def on_fake_tensors(
    mode: FakeTensorMode, *others: AbstractContextManager[Any] | None
) -> Generator[None, None, None]:
    """Runs its block on tensors without data. Autograd records nothing of it.

    Args:
        mode: makes the tensors.
        others: further contexts, entered in their order.
    """
    with changing() as changes:  # a mode that stayed would make all tensors fake
        # It prints failures, which are raised too.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        changes.afterwards(partial(setattr, log, "disabled", log.disabled))
        log.disabled = True
        changes.enter(ordinary_tensors())
        changes.enter(mode)
        changes.gradients(False)
        for context in others:
            if context is not None:
                changes.enter(context)
        yield
