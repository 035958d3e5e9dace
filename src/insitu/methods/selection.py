"""Parts of results: which numbers, labels and texts are left when some of an axis are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from insitu.display.axis import Axis
from insitu.display.labels import POSITIONS, numbered
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here

if TYPE_CHECKING:
    from insitu.methods.result import Result

Chosen: TypeAlias = int | str | slice | Sequence[int | str]
"""An index or a label, and the axis is gone; a slice or several of them, and it has those."""


def selected(result: Result, name: str, index: Chosen) -> Result:
    """Returns a part of a result.

    Args:
        result: the result.
        name: the axis that is chosen of.
        index: what is chosen.

    Raises:
        OptionError: if there is no such axis, label or index.
    """
    axis = result.axis(name)
    number = [axis.name for axis in result.axes].index(name)
    numbers = indices(axis, index)
    values, axes = result.values, list(result.axes)
    places = torch.arange(values.numel()).reshape(values.shape)
    if isinstance(numbers, int):
        del axes[number]
        values, places = values.select(number, numbers), places.select(number, numbers)
    else:
        axes[number] = axis[numbers]
        chosen = torch.tensor(numbers, dtype=torch.long)
        values = values.index_select(number, chosen.to(values.device))
        places = places.index_select(number, chosen)
    texts = [result.texts[place] for place in places.flatten().tolist()] if result.texts else ()
    return replace(result, values=values, axes=tuple(axes), texts=tuple(texts))


def of_prompt(result: Result, index: Any) -> Result:
    """Returns the part of one prompt or several.

    Of one, the positions are those of the prompt, and their labels its tokens.

    Args:
        result: the result.
        index: which prompts.
    """
    part = selected(result, "prompt", index)
    numbers = indices(result.axis("prompt"), index)
    if not result.tokens:
        return part
    if not isinstance(numbers, int):
        return replace(part, tokens=tuple(result.tokens[n] for n in numbers))
    tokens = result.tokens[numbers]
    for axis in part.axes:
        if axis.name in POSITIONS and axis.labels != tokens and numbered(axis.labels):
            there = [at for at, label in enumerate(axis.labels) if int(label) < len(tokens)]
            own = Axis(axis.name, tuple(tokens[int(axis.labels[at])] for at in there))
            part = selected(part, axis.name, there)
            part = replace(part, axes=tuple(own if a.name == axis.name else a for a in part.axes))
    return replace(part, tokens=(tokens,))


def indices(axis: Axis, index: Any) -> int | list[int]:
    """Returns what was chosen of an axis, as numbers from 0.

    Args:
        axis: the axis.
        index: see `Chosen`.

    Raises:
        OptionError: if there is no such label or index.
    """
    if isinstance(index, slice):
        return list(range(len(axis)))[index]
    if isinstance(index, int | str):
        return _number(axis, index)
    return [_number(axis, one) for one in index]


def _number(axis: Axis, index: int | str) -> int:
    if isinstance(index, str):
        if axis.labels.count(index) != 1:
            what = "no" if index not in axis.labels else "more than one"
            raise OptionError(
                f"There is {what} {axis.name} {index!r}{nearest(index, axis.labels)}.", here()
            )
        return axis.labels.index(index)
    try:
        return range(len(axis))[index]
    except IndexError:
        raise OptionError(
            f"The axis {axis.name!r} has {len(axis)} entries: there is no {index}.", here()
        ) from None
