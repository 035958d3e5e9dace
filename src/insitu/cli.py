"""The command line: `insitu check`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from insitu.models.model import Model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback()
def insitu() -> None:
    """Opens up a neural network while it runs."""


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="A repo id, a folder, or a bundled model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")] = False,
    revision: Annotated[str | None, typer.Option(help="Which revision of a repository.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as `bfloat16`, or `auto`.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Such as `auto`, or `cuda`.")] = None,
) -> None:
    """Shows what Insitu takes a model's parts to be, and verifies it in a run of a few tokens.

    Of each standard name it says what it stands for, with the shape of its value in that run, or
    why there is nothing. Then it says what holds: whether residuals add up, heads reassemble,
    attention patterns sum to one and the last residual gives the logits.

    Exits with 0 if all of it holds, with 1 if something differs, and with 2 if the model cannot
    be loaded, or cannot be run.

    **Example:** `insitu check insitu/eiffel`
    """
    given = {"revision": revision, "dtype": dtype, "device_map": device_map}
    kwargs = {name: value for name, value in given.items() if value is not None}
    with _failing(model):
        from insitu.models.checking import check as checked

        report = checked(_loaded(model, kwargs), model)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        from rich.console import Console

        from insitu.display.report import render

        Console(soft_wrap=False).print(render(report))
    raise typer.Exit(0 if report.ok else 1)


def _openers() -> Iterator[Callable[..., Model]]:
    """Ways to open a model by its name, the first that works."""
    from insitu import LanguageModel, Model

    yield LanguageModel
    yield Model.from_pretrained


def _loaded(name: str, kwargs: dict[str, Any]) -> Model:
    """A model with its weights."""
    failures: list[Exception] = []
    for opener in _openers():
        try:
            model = opener(name, **kwargs)
            model.load()
            return model
        except Exception as error:  # the next one may know more about it
            failures.append(error)
    raise failures[0]


@contextmanager
def _failing(name: str) -> Iterator[None]:
    """Says in a line why a model cannot be loaded or run, and exits."""
    from insitu.graph.errors import InsituError

    try:
        yield
    except Exception as error:  # whatever a library makes of files that are wrong
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not isinstance(error, InsituError):
            said = f"{name!r} cannot be loaded: {said}"
        typer.secho(said, fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
