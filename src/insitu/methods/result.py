"""`Result`: what a method found, as numbers with named axes.

A result is plain data: it knows nothing of the model that it came from, and how it is drawn is
the business of `insitu.display`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import torch

from insitu.display.axis import Axis
from insitu.display.drawable import Drawable
from insitu.display.figure import Kind, figure
from insitu.display.labels import POSITIONS, numbered
from insitu.display.page import for_notebook
from insitu.display.table import summary, table
from insitu.graph.errors import MissingPackageError, OptionError, ShapeError, nearest
from insitu.graph.location import here
from insitu.methods import files
from insitu.methods.selection import Chosen, counted_from_end, details_of, of_prompt, selected

if TYPE_CHECKING:
    from typing import Self

    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

_KIND = "result"


class _Told(msgspec.Struct):
    """What a file keeps of a result beside its tensors: fields as of `Result`."""

    title: str
    quantity: str
    axes: list[tuple[str, list[str]]]
    tokens: list[list[str]]
    texts: list[str]
    centre: float | None = None


class Cell(NamedTuple):
    """One number of a result.

    Attributes:
        labels: where it stands: the label on each axis, by the axis's name.
        value: the number.
        text: what else there is to say of it, "" if nothing.
    """

    labels: Mapping[str, str]
    value: float
    text: str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result(Drawable):
    """What a method found: numbers with named axes.

    Attributes:
        title: what was done, such as "Activation patching of residual_in".
        quantity: what a number is, such as "logit difference".
        values: the numbers, an axis for each of `axes`. Where prompts of different length are
            rows of one result, positions that a prompt does not have are NaN.
        axes: what its axes run over.
        tokens: the tokens of each prompt, where positions are an axis.
        texts: what else there is to say of each number, in the order of `values.flatten()`: of a
            lens the most likely token. Empty if there is nothing.
        details: what else was measured, by name: see the method.
        centre: the value that stands for "nothing", at which colours turn; None if there is none.
    """

    title: str
    quantity: str
    values: torch.Tensor
    axes: tuple[Axis, ...]
    tokens: tuple[tuple[str, ...], ...] = ()
    texts: tuple[str, ...] = ()
    details: Mapping[str, torch.Tensor] = field(default_factory=dict)
    centre: float | None = None

    def __post_init__(self) -> None:
        # Errors are of the line that calls the `__init__` which the dataclass has: hence `here(3)`.
        sizes = tuple(map(len, self.axes))
        if tuple(self.values.shape) != sizes:
            names = ", ".join(f"{axis.name} {len(axis)}" for axis in self.axes)
            raise ShapeError(
                f"Values of shape {tuple(self.values.shape)} do not have the axes {names}.", here(3)
            )
        if self.texts and len(self.texts) != self.values.numel():
            raise ShapeError(
                f"There are {len(self.texts)} texts for {self.values.numel()} values.", here(3)
            )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """The values, as NumPy asks for them: `np.asarray(result)`."""
        import numpy

        values = self.values.detach().cpu()
        values = values.float() if values.dtype is torch.bfloat16 else values  # NumPy has none
        return numpy.array(values.numpy(), dtype=dtype, copy=copy)

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each axis, by name."""
        return {axis.name: len(axis) for axis in self.axes}

    def axis(self, name: str) -> Axis:
        """Returns the axis of a name.

        Raises:
            OptionError: if there is none.
        """
        return self.axes[self._number(name)]

    def select(self, **chosen: Chosen) -> Result:
        """Returns a part of it.

        With a prompt chosen, the positions are those of the prompt, and their labels its tokens.
        Details that begin with the same axes as the result are cut in the same way.

        Args:
            chosen: by the name of an axis: a number or a label, and the axis is gone; a slice or
                several of them, and it has those. Layers, heads and all else that is counted go by
                their own numbers, so `layer=3` is layer 3 also where only some are there, or an
                embedding stands before them; positions are counted from 0. Negative numbers count
                from the end, and slices are those of the entries.

        Raises:
            OptionError: if there is no such axis, label or number.

        Example:
            `result.select(layer=3, head=[0, 2], position=-1)`
        """
        result = self
        if "prompt" in chosen:
            result = of_prompt(result, chosen.pop("prompt"))
        for name, index in chosen.items():
            result = selected(result, name, index)
        return result

    def at(self, **places: int) -> Result:
        """Returns a part of it, as `select` does, with entries counted from 0 on every axis.

        Args:
            places: by the name of an axis, the place of the entry on it.

        Raises:
            OptionError: if there is no such axis, or no such entry on it.
        """
        return self.select(
            **{name: counted_from_end(self.axis(name), place) for name, place in places.items()}
        )

    def mean(self, name: str) -> Result:
        """Returns the mean over an axis, of the values that are there.

        Details that begin with the same axes as the result, up to that one, are averaged too, and
        left out if they are whole numbers, such as ids.

        Args:
            name: the axis, such as "prompt".

        Raises:
            OptionError: if there is none of that name.
        """
        number = self._number(name)
        axes = (*self.axes[:number], *self.axes[number + 1 :])
        values = self.values if self.values.is_floating_point() else self.values.float()
        tokens = self.tokens
        if name == "prompt":
            tokens = tokens[:1] if len(set(tokens)) == 1 else ()
        return replace(
            self,
            values=values.nanmean(number),
            axes=axes,
            texts=(),
            tokens=tokens,
            details=details_of(
                self, number, lambda d: d.nanmean(number) if d.is_floating_point() else None
            ),
        )

    def top(self, count: int = 10, *, by_size: bool = False) -> list[Cell]:
        """Returns the largest of its numbers, the largest first.

        Args:
            count: how many.
            by_size: whether those far below zero count as large too.

        Raises:
            OptionError: if there is no such count.
        """
        if count < 0:
            raise OptionError(f"`count` is a whole number from 0 on, not {count!r}.", here())
        flat = self.values.flatten().float()
        there = flat.isnan().logical_not().nonzero().flatten()
        order = flat[there].abs() if by_size else flat[there]
        best = there[order.topk(min(count, len(order))).indices].tolist()
        return [self._cell(number, float(flat[number])) for number in best]

    def cells(self) -> Iterable[Cell]:
        """Gives all its numbers that are there, row by row."""
        values = self.values.flatten().float().tolist()
        return (self._cell(at, value) for at, value in enumerate(values) if value == value)

    def plot(
        self,
        kind: Kind | None = None,
        *,
        x: str | None = None,
        y: str | None = None,
        grid: str | None = None,
        in_cells: bool | None = None,
        title: str | None = None,
        width: float | None = None,
        height: float | None = None,
    ) -> Figure:
        """Returns a picture of it, as a figure of plotly.

        One axis gives bars, or a line if it is measured, and two a heat map. Of more there is a
        grid of heat maps, and the entries of the other axes can be chosen in the picture.

        Args:
            kind: "heat map", "bars", "line", or "text", which is a prompt whose tokens have the
                colours of their numbers; None for what suits the axes.
            x: the name of the axis from left to right.
            y: of a heat map, the axis at its side.
            grid: of a heat map, the axis whose entries are all drawn, in a panel each.
            in_cells: of a heat map, whether texts, or numbers where there are none, stand in the
                cells; None for where they are few enough.
            title: what stands over it; None for its own title.
            width: of the whole, in pixels; None for what suits it.
            height: of the whole, in pixels; None for what suits it.

        Raises:
            OptionError: if an option has no meaning for its axes, or there is too much to draw.
            MissingPackageError: if plotly is not installed.
        """
        return figure(
            self,
            kind,
            x=x,
            y=y,
            grid=grid,
            in_cells=in_cells,
            title=title,
            width=width,
            height=height,
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns a table with a row for each number: a column for each axis, and `value`.

        Layers, heads and all else that is counted are numbers. Positions are tokens, which may
        come again, so beside each axis of these is a column such as `position_number`, which counts
        its entries from 0, as `select` does. Where there are texts, they are a column `text`.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        pandas = pandas_package()

        cells = list(self.cells())
        places = self.values.float().isnan().logical_not().nonzero().T.tolist()
        columns: dict[str, Any] = {}
        for axis, numbers in zip(self.axes, places, strict=True):
            columns[axis.name] = _column(axis, [cell.labels[axis.name] for cell in cells])
            if axis.name in POSITIONS:
                columns[f"{axis.name}_number"] = numbers
        columns["value"] = [cell.value for cell in cells]
        if self.texts:
            columns["text"] = [cell.text for cell in cells]
        return pandas.DataFrame(columns)

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's own types."""
        told = self._told()
        told["values"] = _listed(self.values)
        told["details"] = {name: _listed(value) for name, value in self.details.items()}
        return told

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to a safetensors file, whole or not at all.

        Args:
            path: where to.
        """
        tensors = {f"details.{name}": value for name, value in self.details.items()}
        axes = [(axis.name, list(axis.labels)) for axis in self.axes]
        tokens = [list(one) for one in self.tokens]
        told = _Told(self.title, self.quantity, axes, tokens, list(self.texts), self.centre)
        files.write(path, _KIND, {"values": self.values, **tensors}, told)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Returns what `save` has written.

        Args:
            path: the file.

        Raises:
            LoadError: if it is no such file.
        """
        return files.read(path, _KIND, _Told, cls._read)

    @classmethod
    def _read(cls, told: _Told, tensors: files.Tensors) -> Self:
        names = [name for name, _ in told.axes]
        if len(set(names)) < len(names):
            raise ShapeError(f"two of its axes have one name: {', '.join(names)}.")
        return cls(
            told.title,
            told.quantity,
            tensors.take("values", "...", floating=False),
            tuple(Axis.of(name, labels) for name, labels in told.axes),
            tuple(map(tuple, told.tokens)),
            tuple(told.texts),
            tensors.rest("details."),
            told.centre,
        )

    def __repr__(self) -> str:
        return summary(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield table(self, options.max_width)

    def _repr_html_(self) -> str:
        return for_notebook(self)

    def _told(self) -> dict[str, Any]:
        """All that is no tensor."""
        return {
            "title": self.title,
            "quantity": self.quantity,
            "axes": [[axis.name, list(axis.labels)] for axis in self.axes],
            "tokens": [list(tokens) for tokens in self.tokens],
            "texts": list(self.texts),
            "centre": self.centre,
        }

    def _number(self, name: str) -> int:
        names = [axis.name for axis in self.axes]
        if name not in names:
            raise OptionError(
                f"The result has no axis {name!r}{nearest(name, names)}: it has "
                f"{', '.join(map(repr, names)) or 'none'}.",
                here(),
            )
        return names.index(name)

    def _cell(self, number: int, value: float) -> Cell:
        place = []
        rest = number
        for axis in reversed(self.axes):
            rest, index = divmod(rest, len(axis))
            place.append((axis.name, axis.labels[index]))
        text = self.texts[number] if self.texts else ""
        return Cell(dict(reversed(place)), value, text)


def _column(axis: Axis, labels: list[str]) -> list[int] | list[str]:
    """Labels as numbers, if all of their axis are."""
    return [int(label) for label in labels] if numbered(axis.labels) else labels


def _listed(values: torch.Tensor) -> Any:
    """A tensor as lists, with None for numbers that are not there."""
    if values.is_floating_point() and values.isnan().any():
        return [_listed(part) for part in values] if values.ndim else None
    return values.tolist()


def pandas_package() -> Any:
    """Returns pandas, which tables take.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise MissingPackageError(
            "Tables take pandas, which is not installed: `pip install 'insitu[plot]'`.", here()
        ) from None
    return pandas
