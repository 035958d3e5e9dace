"""Parts of results: which numbers, labels and texts are left when some of an axis are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
"""A number or a label, and the axis is gone; a slice or several of them, and it has those."""


def selected(result: Result, name: str, index: Chosen) -> Result:
    """Returns a part of a result.

    Args:
        result: the result.
        name: the axis that is chosen of.
        index: the entries that are chosen.

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
    else:
        axes[number] = axis[numbers]
    values, places = (_part(each, number, numbers) for each in (values, places))
    texts = [result.texts[place] for place in places.flatten().tolist()] if result.texts else ()
    return replace(
        result,
        values=values,
        axes=tuple(axes),
        texts=tuple(texts),
        tokens=_tokens(result, axis, numbers),
        details=details_of(result, number, lambda detail: _part(detail, number, numbers)),
    )


def details_of(
    result: Result, number: int, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """Returns the details of a result, those changed that have one of its axes.

    A detail has an axis of the result if it begins with all its axes as far as that one. The metric
    of the clean run begins with "prompt", the ids of a lens with "prompt", "layer" and "position".

    Args:
        result: the result.
        number: the number of the axis.
        change: what becomes of a detail that has it; None if it is left out.
    """
    sizes = result.values.shape[: number + 1]
    found = {
        name: change(detail) if detail.shape[: number + 1] == sizes else detail
        for name, detail in result.details.items()
    }
    return {name: detail for name, detail in found.items() if detail is not None}


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
    # Positions that were chosen are in the order of the axis, and each prompt has all of them.
    in_order = {len(others) for others in result.tokens} == {len(tokens)}
    for axis in part.axes:
        if axis.name not in POSITIONS or axis.labels == tokens or not _counted(axis.labels):
            continue
        if in_order and len(axis) == len(tokens):
            there, own = list(range(len(tokens))), tokens
        elif numbered(axis.labels):
            there = [at for at, label in enumerate(axis.labels) if int(label) < len(tokens)]
            own = tuple(tokens[int(axis.labels[at])] for at in there)
        else:
            continue
        part = replace(selected(part, axis.name, there), tokens=part.tokens)
        named = Axis(axis.name, own)
        part = replace(part, axes=tuple(named if a.name == axis.name else a for a in part.axes))
    return replace(part, tokens=(tokens,))


def _part(values: torch.Tensor, number: int, chosen: int | list[int]) -> torch.Tensor:
    """The numbers that are left if some of an axis are chosen."""
    if isinstance(chosen, int):
        return values.select(number, chosen)
    places = torch.tensor(chosen, dtype=torch.long, device=values.device)
    return values.index_select(number, places)


def _tokens(result: Result, axis: Axis, chosen: int | list[int]) -> tuple[tuple[str, ...], ...]:
    """The tokens of each prompt, those of an axis's positions if that has all of them."""
    alone = [other.name for other in result.axes if other.name in POSITIONS] == [axis.name]
    if isinstance(chosen, int) or not alone:
        return result.tokens
    if any(len(tokens) != len(axis) for tokens in result.tokens):
        return result.tokens
    return tuple(tuple(tokens[at] for at in chosen) for tokens in result.tokens)


def _counted(labels: Sequence[str]) -> bool:
    """Whether labels are numbers of positions, from the end if negative."""
    return numbered([label.removeprefix("-") for label in labels])


def is_counted(axis: Axis) -> bool:
    """Returns whether entries of an axis go by numbers of their own, as layers and heads do.

    Positions do not: a token may be a number too.

    Args:
        axis: the axis.
    """
    return axis.name not in POSITIONS and any(label.isdecimal() for label in axis.labels)


def counted_from_end(axis: Axis, place: Any) -> Any:
    """Returns what chooses the entry at a place of an axis, by place and not by number.

    Args:
        axis: the axis.
        place: the place, from 0, or from the end if negative.

    Raises:
        OptionError: if it has no such place.
    """
    if not is_counted(axis):
        return place
    try:
        if isinstance(place, bool):
            raise TypeError(place)
        return range(len(axis))[place] - len(axis)
    except (IndexError, TypeError):
        raise OptionError(
            f"The axis {axis.name!r} has {len(axis)} entries: there is none at {place!r}.", here()
        ) from None


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
    if isinstance(index, torch.Tensor):
        index = index.tolist()
    if isinstance(index, Iterable) and not isinstance(index, str):
        return [_place(axis, one) for one in index]
    return _place(axis, index)


def _place(axis: Axis, index: Any) -> int:
    """The number of an entry of an axis, from 0."""
    if isinstance(index, bool):  # of a mask: as numbers they would be entries 0 and 1
        raise _refused(axis, index)
    if is_counted(axis) and isinstance(index, int) and index >= 0:
        if str(index) not in axis.labels:
            raise OptionError(
                f"There is no {axis.name} {index}: there are {', '.join(axis.labels)}.", here()
            )
        return axis.labels.index(str(index))
    if isinstance(index, str):
        if axis.labels.count(index) != 1:
            if index in axis.labels:
                places = [at for at, label in enumerate(axis.labels) if label == index]
                raise OptionError(
                    f"There is more than one {axis.name} {index!r}: give one of the indices "
                    f"{', '.join(map(str, places))}.",
                    here(),
                )
            raise OptionError(
                f"There is no {axis.name} {index!r}{nearest(index, axis.labels)}.", here()
            )
        return axis.labels.index(index)
    try:
        return range(len(axis))[index]
    except IndexError:
        raise OptionError(
            f"The axis {axis.name!r} has {len(axis)} entries: there is no {index}.", here()
        ) from None
    except TypeError:
        raise _refused(axis, index) from None


def _refused(axis: Axis, index: Any) -> OptionError:
    return OptionError(
        f"Of {axis.name!r} one chooses a number, a label, a slice or several of them, not "
        f"{index!r}.",
        here(),
    )
