"""What `feature_examples` finds: the contexts in which features are largest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from insitu.display.axis import Axis
from insitu.display.drawable import Drawable
from insitu.display.token_lines import (
    TokenLine,
    TokenLines,
    lines_figure,
    lines_html,
    printed_lines,
)
from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.methods.result import Result, pandas_package

if TYPE_CHECKING:
    import pandas
    from plotly.graph_objects import Figure
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, slots=True, eq=False)
class FeatureExample:
    """A place at which a feature is large, with the tokens around it.

    Attributes:
        feature: the number of the feature.
        value: how large it is there.
        row: the row of the activations.
        sequence: the number of the sequence.
        position: the position in it.
        document: the row of the data.
        tokens: the tokens around that place, as text.
        token_ids: the ids of these tokens, int64 `(tokens,)`.
        values: how large the feature is at each of them, float32 `(tokens,)`.
        peak: which of them the place is, from 0.
    """

    feature: int
    value: float
    row: int
    sequence: int
    position: int
    document: int
    tokens: tuple[str, ...]
    token_ids: torch.Tensor
    values: torch.Tensor
    peak: int

    @property
    def token(self) -> str:
        """The token at which the feature is so large."""
        return self.tokens[self.peak]

    @property
    def text(self) -> str:
        """The tokens as one text."""
        return "".join(self.tokens)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FeatureExamples(Drawable):
    """The contexts in which some features are largest.

    Attributes:
        site: the site that the features are of.
        features: the numbers of the features.
        examples: of each feature its examples, the largest first.
        counts: at how many rows each feature is above 0.
        rows: how many rows were looked at.
    """

    site: str
    features: tuple[int, ...]
    examples: tuple[tuple[FeatureExample, ...], ...]
    counts: tuple[int, ...]
    rows: int

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[tuple[FeatureExample, ...]]:
        return iter(self.examples)

    def __getitem__(self, feature: int) -> tuple[FeatureExample, ...]:
        return self.examples[self._place(feature)]

    def density(self, feature: int) -> float:
        """Returns at which part of all rows a feature is above 0.

        Raises:
            OptionError: if it is none of the features.
        """
        return self.counts[self._place(feature)] / max(self.rows, 1)

    def select(self, feature: int) -> FeatureExamples:
        """Returns those of one feature.

        Raises:
            OptionError: if it is none of the features.
        """
        at = self._place(feature)
        return FeatureExamples(
            self.site, (feature,), (self.examples[at],), (self.counts[at],), self.rows
        )

    def result(self, feature: int) -> Result:
        """Returns the numbers of a feature: with the axes prompt, an example each, and position.

        Args:
            feature: the number of the feature.

        Raises:
            OptionError: if it is none of the features, or has no example.
        """
        found = self[feature]
        if not found:
            raise OptionError(f"Feature {feature} has no example: it is nowhere above 0.", here())
        values = torch.full((len(found), max(len(one.tokens) for one in found)), float("nan"))
        for row, one in enumerate(found):
            values[row, : len(one.values)] = one.values
        axes = (Axis.of("prompt", range(len(found))), Axis.of("position", range(values.shape[1])))
        title = f"Feature {feature} of {self.site}"
        tokens = tuple(one.tokens for one in found)
        return Result(title, "activation", values, axes, tokens)

    def plot(
        self, feature: int | None = None, *, title: str | None = None, width: float | None = None
    ) -> Figure:
        """Returns a picture of the examples of a feature: tokens on the colours of its size.

        Args:
            feature: which; None if there is but one.
            title: what stands over it.
            width: of the whole, in pixels; None for what suits it.

        Raises:
            OptionError: if it is none of the features, or there are several and none was chosen.
            MissingPackageError: if plotly is not installed.
        """
        if feature is None and len(self.features) != 1:
            raise OptionError(f"Which feature is drawn? There are {list(self.features)}.", here())
        at = 0 if feature is None else self._place(feature)
        return lines_figure(self._lines()[at], title, width)

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns a table with a row for each example.

        Its columns are feature, rank, value, token, text, document, sequence and position.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        pandas = pandas_package()
        names = ("feature", "value", "token", "text", "document", "sequence", "position")
        columns: dict[str, list[Any]] = {name: [] for name in ("feature", "rank", *names[1:])}
        for found in self.examples:
            for rank, one in enumerate(found):
                columns["rank"].append(rank)
                for name in names:
                    columns[name].append(getattr(one, name))
        return pandas.DataFrame(columns)

    def __repr__(self) -> str:
        count = sum(map(len, self.examples))
        return f"<Examples of {len(self)} features of {self.site}: {count} in {self.rows:,} rows>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield printed_lines(self._lines())

    def _repr_html_(self) -> str:
        return lines_html(self._lines())

    def _lines(self) -> list[TokenLines]:
        groups: list[TokenLines] = []
        for feature, found in zip(self.features, self.examples, strict=True):
            share = f"{self.density(feature) * 100:.3g}%"
            title = f"Feature {feature} of {self.site}, above 0 at {share} of rows"
            lines = [TokenLine(f"{o.value:.3g}", o.tokens, o.values.tolist()) for o in found]
            groups.append(TokenLines(title, lines))
        return groups

    def _place(self, feature: int) -> int:
        if feature not in self.features:
            raise OptionError(
                f"Feature {feature!r} was not looked for: there are {list(self.features)}.", here()
            )
        return self.features.index(feature)
