"""What a block would fail at, found on fake tensors before the weights of its model are loaded.

A run on fake tensors takes about as long as loading a tiny model, so it is made only for lines
that can fail, and not for every length of prompt. A model that is loaded is not looked at: its run
fails at the same lines. One question waits for the weights: whether the softmax can be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import Any, cast

import torch

from insitu.batching.procedure import Subject
from insitu.graph.errors import InsituError, OptionError, ShapeError, UnknownShapeError
from insitu.graph.location import Location, Mark
from insitu.graph.node import Ref, Row
from insitu.graph.operations import (
    APPLY,
    ARITHMETIC,
    ATTRIBUTE,
    COND,
    FOLD,
    GETITEM,
    GRAD,
    KEEP,
    READ,
    SAVE,
    SETITEM,
    WRITE,
)
from insitu.graph.shapes import calls_function, fake_value, works_in_one_dtype
from insitu.tracing.run import Run

_NEVER_FAIL = (READ, SAVE, KEEP, GRAD, ATTRIBUTE)
_BY_VALUE = (APPLY, COND, FOLD)  # what of them runs depends on values, or on there being values
_DEVICES = ("found two different devices", "on the same device")
_MOST = 4  # fake runs: one for each form of prompt


def check_fit(run: Run) -> None:
    """Raises at the first line whose values do not fit together, as far as that can be known.

    Args:
        run: the run that is about to begin.

    Raises:
        InsituError: pointing at that line.
    """
    lines, knows_dtypes = run.lines, run.model.knows_dtypes
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        knows_dtypes = False
    contexts = lines.graph.contexts.values()
    if any(device != "cpu" for context in contexts for device, _ in context.casts):
        knows_dtypes = False  # fake tensors are on the CPU
    for index in _fallible(run):
        operation = lines.graph.rows[index][0]
        try:
            fake_value(lines, index)
        except UnknownShapeError:
            continue
        except ShapeError as error:
            # Fake tensors are on the CPU, and the user's constants where the model will be.
            elsewhere = any(said in str(error) for said in _DEVICES)
            if elsewhere or operation in _BY_VALUE:
                continue
            if knows_dtypes or not works_in_one_dtype(lines, index):
                raise
        except InsituError:  # such as of a module that may be called in a run with data
            continue
        except Exception:  # a tensor that has no fake one, such as of a class of the user's
            continue


def _fallible(run: Run) -> list[int]:
    """The nodes whose values may not fit together, of a few forms of prompt."""
    rows = run.lines.graph.rows
    found: list[int] = []
    invocations = run.lines.graph.invocations()
    forms: set[str] = set()
    opaque: set[int] = set()  # what functions of the user's make: those are called in the run only
    for index, row in enumerate(rows):
        operation, args, _, inputs, _, _ = row
        if operation is READ:
            continue
        if calls_function(args) or not opaque.isdisjoint(inputs):
            opaque.add(index)
            continue
        if operation in _NEVER_FAIL or _is_safe(rows, row):
            continue
        now = forms.union(run.call(number).signature() for number in invocations[index])
        # A fake run for each of many lengths would take longer than it is worth.
        if len(now) <= _MOST:
            forms = now
            found.append(index)
    return found


def _is_safe(rows: list[Row], row: Row) -> bool:
    """Whether an operation goes well with tensors of any shape, or nearly so.

    That is said of what most blocks consist of: `logits[0, -1].argmax()`, `hidden * 2`,
    `hidden[:, -1] = 0`, and writing such a value where its first operand was read.
    """
    operation, args, kwargs, inputs, _, _ = row
    # Keywords are rare here, and what they mean is not looked into.
    if kwargs:
        return False
    if operation is WRITE:
        value = args[1]
        return type(value) is Ref and _origin(rows, value.index, args[2]) == args[0].index
    if len(inputs) != 1 or type(args[0]) is not Ref:
        return False
    if operation.short in _WITH_NUMBERS:
        return isinstance(args[1], int | float)
    if operation is SETITEM:
        return isinstance(args[2], int | float) and _is_plain_key(args[1])
    return all(map(_is_plain_key, args[1:]))


_PLAIN = {operation.short for operation in ARITHMETIC}
_WITH_NUMBERS = _PLAIN | {f"i{name}" for name in _PLAIN}


def _is_plain_key(key: Any) -> bool:
    """Whether something is an index, or an axis, that tensors of nearly every shape have."""
    if isinstance(key, tuple):
        return all(map(_is_plain_key, cast("tuple[Any, ...]", key)))
    return key in (0, -1) if type(key) is int else isinstance(key, slice | EllipsisType)


def _origin(rows: list[Row], index: int, block: bool) -> int:
    """The site's node whose shape a value has, or its hidden states if it is that of a block."""
    operation, args, _, inputs, _, _ = rows[index]
    # Arithmetic with numbers leaves the shape as it was.
    while len(inputs) == 1 and operation.short in _WITH_NUMBERS and _is_safe(rows, rows[index]):
        index = inputs[0]
        operation, args, _, inputs, _, _ = rows[index]
    if block and operation is GETITEM and args[1] == 0 and type(args[1]) is int:
        return inputs[0]
    return index


def verify(model: Subject, options: Mapping[str, Any], line: Mark) -> None:
    """Raises if the model computes something else with what a value demands.

    Args:
        model: the model, with its weights.
        options: the options that the value takes.
        line: the line that reads it.

    Raises:
        OptionError: in that case.
    """
    if not model.vocabulary.verify(options):
        raise OptionError(
            "The attention of this model computes something else where its softmax can be "
            "seen, which is known now that its weights are there: give "
            "`attn_implementation='eager'` where the model is made.",
            Location(*line),
        )
