"""One write in place as a pure function: a changed copy of the value that holds the part.

A step leads from a value to a part of it: an operation that returns a view, or an entry of a tuple.
All steps are carried out on the copy, and the operation then writes into what they end in. So a
write means what it means in torch, with its casts, its broadcasting and its errors, through any
chain of views, and no view needs an inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from insitu.graph.errors import OperationError
from insitu.graph.structure import is_basic, storage_of
from insitu.graph.writing import replaced

Step = tuple[str, int | str, tuple[Any, ...], Mapping[str, Any]]
"""An operation's name, which argument the value is (a position or a keyword), and the others."""

WHOLE = object()
"""In the place of a key: all of a value."""

# Operations that return several views at once.
_SEVERAL = frozenset(
    ("chunk", "dsplit", "hsplit", "split", "split_with_sizes", "tensor_split", "unbind", "vsplit")
)


def put(
    base: Any,
    steps: Sequence[Step],
    write: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    function: Callable[[str], Callable[..., Any]],
    reuse: int = -1,
) -> Any:
    """Returns a value with a part of it written; nothing else changes.

    Args:
        base: a tensor, or a tuple, list or dictionary. Only the tensor on the way is copied.
        steps: what leads from it to the part, outermost first.
        write: writes into its first argument.
        args: its arguments behind the first one.
        kwargs: its keyword arguments.
        function: gives the function of an operation by its name.
        reuse: how many of the first steps lead to the tensor that an earlier write has copied, and
            that nobody else needs; -1 if there is none. A tensor that is reached by then is
            written into, and no copy of it.

    Raises:
        OperationError: if a step gives memory of its own, so that the write would be lost.
    """
    if not isinstance(base, torch.Tensor):
        if not steps:
            raise OperationError(
                f"a {type(base).__name__} is not written in place: assign a whole new one"
            )
        name, place, others, _ = steps[0]
        taken = step_taken(base, steps[0], function)
        entry = put(taken, steps[1:], write, args, kwargs, function, reuse - 1)
        if name not in ("operator.getitem", "attribute") or place != 0:
            raise OperationError(
                f"what `{name}` makes of a structure is not written in place: write into an entry "
                "of it, such as `value[0]`"
            )
        return replaced(base, others[0], entry)
    copy = base if reuse >= 0 else _copied(base)
    part: Any = copy
    for step in steps:
        part = step_taken(part, step, function)
    if part is not copy and not _shares(part, copy):
        raise OperationError(
            "the write would be lost, because this part has memory of its own in the run: write "
            "into the value itself"
        )
    if torch.is_grad_enabled() and _is_one_of_several(steps) and part.dtype == copy.dtype:
        # Autograd refuses writes into one of several views; the same memory as one view is fine.
        part = copy.as_strided(part.size(), part.stride(), part.storage_offset())
    write(part, *args, **kwargs)
    return copy


def _shares(part: Any, copy: torch.Tensor) -> bool:
    """Whether a part lies in the memory of the copy that it was taken from."""
    if getattr(part, "_base", None) is copy:
        return True
    return isinstance(part, torch.Tensor) and storage_of(part) == storage_of(copy)


def _copied(base: torch.Tensor) -> torch.Tensor:
    """A copy. A write under `torch.no_grad` changes numbers, and not their history."""
    if not base.requires_grad or torch.is_grad_enabled():
        return base.clone()
    with torch.enable_grad():
        return base.clone()


def is_entry(one: Any, other: Any) -> bool:
    """Returns whether two keys take the same part of a value, and that part is no copy."""
    return type(one) is type(other) and is_basic(one) and is_basic(other) and one == other


def step_taken(value: Any, step: Step, function: Callable[[str], Callable[..., Any]]) -> Any:
    """Returns the part of a value to which a step leads."""
    name, place, others, kwargs = step
    if isinstance(place, str):
        return function(name)(*others, **{**kwargs, place: value})
    return function(name)(*others[:place], value, *others[place:], **kwargs)


def _is_one_of_several(steps: Sequence[Step]) -> bool:
    names = {step[0].rpartition(".")[2] for step in steps}
    return "detach" not in names and not names.isdisjoint(_SEVERAL)
