"""Options of commands: their types, how they are read, and how an error names them.

All checks here come before a model is loaded. What the commands do is in `cli.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Name = Annotated[str, typer.Argument(help="A repo id, a folder, or a bundled model.")]
Prompt = Annotated[str, typer.Argument(help="The text that the model reads.")]
Layers = Annotated[
    str | None, typer.Option(help="Which layers, such as `3`, `0,5`, `2-4`, or `-1` for the last.")
]
Positions = Annotated[
    str | None,
    typer.Option(help="Which positions, such as `3`, `0,5`, `2-4`, or `-1` for the last."),
]
Revision = Annotated[str | None, typer.Option(help="Which revision of a repository.")]
Dtype = Annotated[str | None, typer.Option(help="Such as `bfloat16`, or `auto`.")]
DeviceMap = Annotated[str | None, typer.Option(help="Such as `auto`, or `cuda`.")]
Remote = Annotated[
    str | None,
    typer.Option(help="The URL of a server that has the model and runs it: see `insitu serve`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
Html = Annotated[Path | None, typer.Option(help="Write a page to this file.")]
Picture = Annotated[
    Path | None,
    typer.Option(
        "--picture", "--png", help="Write a picture to this file: `.png`, `.svg` or `.pdf`."
    ),
]

_MOST_NUMBERS = 100_000  # what is more than any model has is a slip


def check_files(given: Mapping[str, Any]) -> None:
    """Raises if a file cannot be written, before a model is loaded for its content.

    All options that name a file are those of files that are written.

    Args:
        given: all arguments of a command, by name.

    Raises:
        OptionError: if its folder does not exist, or a picture's name ends in something else.
        SaveError: if the file or its folder is read-only.
        MissingPackageError: if what draws pictures is not installed.
    """
    from insitu.disk import check_target
    from insitu.display.page import check_drawing, picture_form

    for name, path in given.items():
        if isinstance(path, Path):
            check_target(path)
            # Of what is printed, an SVG takes nothing that draws.
            if name == "picture" and picture_form(path) != "svg":
                check_drawing()


def check_dtype(name: str | None) -> None:
    """Raises if there is no such dtype of weights.

    Args:
        name: the dtype, or "auto"; None if none was given.

    Raises:
        OptionError: in that case.
    """
    import torch

    from insitu.graph.errors import OptionError, nearest

    known = [one for one in dir(torch) if isinstance(getattr(torch, one), torch.dtype)]
    floating = [one for one in known if getattr(torch, one).is_floating_point]
    if name is not None and name.removeprefix("torch.") not in ("auto", *floating):
        raise OptionError(
            f"There is no dtype {name!r} of weights{nearest(name, floating)}: write "
            "`--dtype` with auto, float32, bfloat16 or float16."
        )


def numbers_in(given: str | None) -> list[int] | None:
    """Returns the numbers in "0,5", "2-4" or "-1".

    Args:
        given: what was written behind an option; None if there was none.

    Raises:
        typer.BadParameter: if it is no such list.
    """
    if given is None:
        return None
    numbers: list[int] = []
    for part in given.split(","):
        found = re.fullmatch(r"\s*(-?\d{1,9})(?:\s*-\s*(-?\d{1,9}))?\s*", part)
        first, last = (found[1], found[2] or found[1]) if found else ("0", "-1")
        several = range(int(first), int(last) + 1)
        if not 0 < len(several) <= _MOST_NUMBERS:
            raise typer.BadParameter(f"{given!r} is no list of numbers, such as 3, 0,5, 2-4 or -1.")
        numbers += several
    return numbers


def as_options(said: str, names: Collection[str]) -> str:
    """Returns an error with the arguments that it names, `positions=[-1]`, as options.

    Args:
        said: what the error says.
        names: the arguments of the command.
    """

    def option(found: re.Match[str]) -> str:
        if found[1] in names and found[2] in ("True", "False"):
            return f"`--{'no-' * (found[2] == 'False')}{found[1]}`"
        return f"`--{found[1]} {found[2]}`" if found[1] in names else found[0]

    return re.sub(r"`(\w+)=\[?([^`\]]+)\]?`", option, said)
