"""What can be drawn: numbers with named axes, and which of the axes goes where in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch

from insitu.display.axis import Axis
from insitu.display.labels import POSITIONS, visible
from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here


class Numbers(Protocol):
    """Numbers with named axes: see `insitu.methods.Result`, which says what the attributes are."""

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def quantity(self) -> str: ...  # noqa: D102
    @property
    def values(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def axes(self) -> tuple[Axis, ...]: ...  # noqa: D102
    @property
    def tokens(self) -> tuple[tuple[str, ...], ...]: ...  # noqa: D102
    @property
    def texts(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def centre(self) -> float | None: ...  # noqa: D102

    def at(self, **places: int) -> Numbers:
        """Returns a part of them: a place by the name of an axis, which is then gone."""
        ...


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Which axis goes where in a picture of panels.

    Attributes:
        y: the axis from top to bottom of a panel.
        x: the axis from left to right.
        grid: the axis that there is a panel of each for, beside each other; None for one panel.
        menu: the axes with one entry shown, where another can be chosen.
    """

    y: str
    x: str
    grid: str | None = None
    menu: tuple[str, ...] = ()


MOST_PANELS = 36
MOST_STATES = 256


def arrange(
    axes: Sequence[Axis], y: str | None = None, x: str | None = None, grid: str | None = None
) -> Arrangement:
    """Returns where to put two or more axes, as one would expect of their names.

    Positions go from left to right, layers and queries stand at the side, heads are a grid of
    panels, and of prompts one is shown.

    Args:
        axes: the axes.
        y: the axis at the side, if it was chosen.
        x: the axis from left to right, if it was chosen.
        grid: the axis of the panels, if it was chosen.

    Raises:
        OptionError: if there is no axis of a name, one is chosen twice, or more pictures are left
            than one can choose of.
    """
    sizes = {axis.name: len(axis) for axis in axes}
    given = [name for name in (y, x, grid) if name is not None]
    for name in given:
        if name not in sizes:
            raise OptionError(
                f"There is no axis {name!r} to draw{nearest(name, sizes)}: there are "
                f"{', '.join(map(repr, sizes))}.",
                here(),
            )
    if len(set(given)) < len(given):
        raise OptionError("An axis has one place in a picture: x, y or grid.", here())
    left = [name for name in sizes if name not in given]
    if x is None:
        x = _first(left, ("key", "position", "head", "token"), last=True)
        left.remove(x)
    if y is None:
        y = _first(left, ("query", "layer"), last=True)
        left.remove(y)
    if grid is None:
        fit = [name for name in left if name != "prompt" and sizes[name] <= MOST_PANELS]
        grid = _first(fit, ("head", "site"), last=True) if fit else None
        left = [name for name in left if name != grid]
    states = prod(sizes[name] for name in left)
    if states > MOST_STATES:
        raise OptionError(
            f"Of {' and '.join(map(repr, left))} there are {states} pictures: choose some with "
            "`select` first.",
            here(),
        )
    return Arrangement(y, x, grid, tuple(left))


def of_prompt(numbers: Numbers, axis: Axis) -> Axis:
    """Returns an axis; one of prompts with the words that they begin with."""
    if axis.name != "prompt" or len(numbers.tokens) != len(axis):
        return axis
    begun = ("".join(tokens).strip() for tokens in numbers.tokens)
    return Axis(axis.name, tuple(f"{n}: {t}" for n, t in zip(axis.labels, begun, strict=True)))


def told(axis: Axis, index: int) -> str:
    """Returns where something stands on an axis: "head 3", or "position 3: ·Paris"."""
    label = axis.labels[index]
    if axis.name in POSITIONS and not label.isdecimal():
        return f"{axis.name} {index}: {visible(label)}"
    if axis.name == "site":
        return label
    return f"{axis.name} {visible(label) if axis.name == 'token' else label}"


def _first(names: Sequence[str], wanted: Sequence[str], last: bool) -> str:
    """The first of the wanted names that there is, or else the last one."""
    return next((name for name in wanted if name in names), names[-1 if last else 0])
