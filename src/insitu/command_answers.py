"""How a command answers: what it found is printed, or written to where it was asked for.

What went wrong is said in one line. How options are read is in `command_options.py`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import Any, NoReturn

import typer

from insitu.command_options import (
    DeviceMap,
    Dtype,
    Html,
    Json,
    Picture,
    Remote,
    Revision,
    as_options,
    check_files,
)

_LOADING = {
    "revision": Revision, "dtype": Dtype, "device_map": DeviceMap, "remote": Remote,
}  # fmt: skip
_WRITING = {"as_json": Json, "html": Html, "picture": Picture}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found.

    Attributes:
        shown: a result, or what rich can print.
        data: the same for JSON; of a result, None for its own.
        said: text that is printed before it, also where it is written to a file.
        printed: what rich prints in a terminal, if it is not all of it.
        written: files that the command itself has written.
        ok: whether what was checked holds.
    """

    shown: Any
    data: Any = None
    said: str = ""
    printed: Any = None
    written: tuple[Path, ...] = ()
    ok: bool = True


def command_of(found: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a command of a function, with the options that say where its answer goes.

    If the function has a parameter `loading` the command has those of how a model is loaded.

    Args:
        found: the function.

    Returns:
        A function for `typer`, which ends in `typer.Exit`.
    """
    own = dict(inspect.signature(found, eval_str=True).parameters)
    added = {**(_LOADING if own.pop("loading", None) else {}), **_WRITING}

    @wraps(found)
    def command(**given: Any) -> None:
        options = {name: given.pop(name) for name in added}
        writing = {name: options.pop(name) for name in _WRITING}
        if options:
            given["loading"] = {name: one for name, one in options.items() if one is not None}
        try:
            check_files({**given, **writing})
            answer = found(**given)
            _write(answer, **writing)
        except typer.BadParameter:
            raise
        except Exception as error:  # such as of a file that cannot be written
            fail(as_options(first_line(error), [*own, *added]))
        raise typer.Exit(0 if answer.ok else 1)

    parameters = [*own.values()]
    for name, annotation in added.items():
        default = False if annotation is Json else None
        kind = Parameter.KEYWORD_ONLY
        parameters.append(Parameter(name, kind, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def fail(said: str) -> NoReturn:
    """Ends a command that cannot be done, with 2.

    Args:
        said: the line that says why.
    """
    typer.secho(said, fg=typer.colors.RED, err=True)
    raise typer.Exit(2) from None


def _write(answer: Answer, as_json: bool, html: Path | None, picture: Path | None) -> None:
    """Prints an answer, or writes it to where it was asked for."""
    from rich.console import Console

    from insitu.display.printed import write_printed_html, write_printed_picture
    from insitu.methods.result import Result

    shown, is_result = answer.shown, isinstance(answer.shown, Result)
    if answer.said and not as_json:
        typer.echo(answer.said)
    if html is not None:
        shown.to_html(html) if is_result else write_printed_html(shown, html)
    if picture is not None:
        shown.to_picture(picture) if is_result else write_printed_picture(shown, picture)
    if as_json:
        data = shown.to_dict() if answer.data is None else answer.data
        typer.echo(json.dumps(data, indent=2))
    elif html is None and picture is None:
        Console(soft_wrap=False).print(shown if answer.printed is None else answer.printed)
    for path in (*answer.written, html, picture):
        if path is not None:  # not to where JSON is read from
            typer.echo(f"Wrote {path}.", err=True)


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
