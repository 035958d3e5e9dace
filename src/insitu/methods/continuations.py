"""Continuations: what a model wrote under some strengths of a steering vector, as a table."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from insitu.display.printed import write_printed_html, write_printed_picture
from insitu.display.rows import rows_html
from insitu.methods.result import pandas_package

if TYPE_CHECKING:
    import pandas
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model wrote under one strength.

    Attributes:
        prompt: the number of the prompt, from 0.
        strength: what the vector was multiplied with.
        ids: the token ids that it generated, `(position,)`, without the prompt.
        text: these as text, "" if the model has no tokenizer.
    """

    prompt: int
    strength: float
    ids: torch.Tensor
    text: str


@dataclass(frozen=True, slots=True)
class Steered:
    """What a model wrote under some strengths.

    Attributes:
        continuations: prompt by prompt, and of each strength by strength.
        strengths: the strengths.
        title: what was done, such as "Steering along residual_out, layer 4".
    """

    continuations: tuple[Continuation, ...]
    strengths: tuple[float, ...]
    title: str = "Steering"

    def __repr__(self) -> str:
        strengths = ", ".join(f"{one:g}" for one in self.strengths)
        return f"<{self.title}: {len(self)} continuations, strengths {strengths}>"

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the continuations, in their order."""
        return tuple(one.text for one in self.continuations)

    def __iter__(self) -> Iterator[Continuation]:
        return iter(self.continuations)

    def __len__(self) -> int:
        return len(self.continuations)

    def __getitem__(self, index: int) -> Continuation:
        return self.continuations[index]

    def of(self, *, prompt: int | None = None, strength: float | None = None) -> Steered:
        """Returns those of one prompt, or of one strength.

        Args:
            prompt: the number of the prompt.
            strength: the strength.
        """
        kept = tuple(
            one
            for one in self.continuations
            if (prompt is None or one.prompt == prompt)
            and (strength is None or one.strength == strength)
        )
        return replace(
            self,
            continuations=kept,
            strengths=self.strengths if strength is None else (strength,),
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """Returns a table with a row for each continuation: its prompt, strength and text.

        Raises:
            MissingPackageError: if pandas is not installed.
        """
        pandas = pandas_package()
        names = ("prompt", "strength", "text")
        rows = [[getattr(one, name) for name in names] for one in self.continuations]
        return pandas.DataFrame(rows, columns=[*names])

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it in JSON's own types."""
        return {
            "title": self.title,
            "strengths": list(self.strengths),
            "continuations": [
                {
                    "prompt": one.prompt,
                    "strength": one.strength,
                    "ids": one.ids.tolist(),
                    "text": one.text,
                }
                for one in self.continuations
            ],
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes it as a page that can be opened without a network.

        Args:
            path: where to.
        """
        write_printed_html(self, path)

    def to_picture(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of it, in the form that the file's name ends in. That takes Chromium.

        Args:
            path: where to: ".png", or ".svg" or ".pdf" for papers.

        Raises:
            OptionError: if the name ends in something else.
            PictureError: if there is no Chromium.
        """
        write_printed_picture(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        head, *rows = self._lines()
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for name in head[:-1]:
            table.add_column(name, justify="right", style="cyan")
        table.add_column("text", overflow="fold")
        for row in rows:
            table.add_row(*row[:-1], Text(row[-1]))
        yield table

    def _repr_html_(self) -> str:
        head, *rows = self._lines()
        return rows_html(head, rows, {"text"})

    def _lines(self) -> list[tuple[str, ...]]:
        """The names of the columns, and the cells of each continuation."""
        many = len({one.prompt for one in self.continuations}) > 1
        lines = [("prompt", "strength", "text")]
        lines += [
            (str(one.prompt), f"{one.strength:g}", repr(one.text)) for one in self.continuations
        ]
        return lines if many else [line[1:] for line in lines]
