"""The command line: `insitu lens`, `insitu patch` and the rest, each a call of a function.

A command prints a table, or writes a picture or JSON. It exits with 0 if all went well, with 1 if
what was checked does not hold, and with 2, and one line that says why, if it could not be done.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from insitu.methods import Result
    from insitu.models.language_model import LanguageModel
    from insitu.models.model import Model

_PAGE = 140  # how many characters wide a table in a page is

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_Name = Annotated[str, typer.Argument(help="A repo id, a folder, or a bundled model.")]
_Prompt = Annotated[str, typer.Argument(help="The text that the model reads.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")]
_Html = Annotated[Path | None, typer.Option(help="Write an interactive picture to this file.")]
_Page = Annotated[Path | None, typer.Option("--html", help="Write the table to this file.")]
_Png = Annotated[Path | None, typer.Option(help="Write a picture to this file.")]
_Revision = Annotated[str | None, typer.Option(help="Which revision of a repository.")]
_Dtype = Annotated[str | None, typer.Option(help="Such as `bfloat16`, or `auto`.")]
_DeviceMap = Annotated[str | None, typer.Option(help="Such as `auto`, or `cuda`.")]
_Layers = Annotated[str | None, typer.Option(help="Which layers, such as `3`, `0,5` or `2-4`.")]


@app.callback()
def insitu() -> None:
    """Opens up a neural network while it runs."""


@app.command()
def demo(html: _Html = None, png: _Png = None) -> None:
    """Runs the demo on the model that comes with the package: a fact, and where it is recalled.

    **Example:** `insitu demo`
    """
    prompt = "The Eiffel Tower is in the city of"
    with _failing():
        from insitu import LanguageModel
        from insitu.methods import logit_lens

        model = LanguageModel("insitu/eiffel", device_map="cpu")
        with model.generate(prompt, max_new_tokens=1) as generator:
            hidden_states = model.transformer.h[-1].output[0].save()
        _print(f"{model.tokenizer.decode(generator.output[0])!r}")
        _print(f"behind the last block: {tuple(hidden_states.value.shape)}\n")
        _show(logit_lens(model, prompt), False, html, png)


@app.command()
def tree(
    model: _Name,
    depth: Annotated[int | None, typer.Option(help="How deep, all of it unless given.")] = None,
    html: _Page = None,
    revision: _Revision = None,
) -> None:
    """Shows a model's modules, with the standard names beside their own. No weights are loaded.

    **Example:** `insitu tree insitu/eiffel --depth 3`
    """
    with _failing(model):
        opened = _opened(model, _given(revision=revision), load=False)
        _print(opened.tree(depth), html)


@app.command()
def check(
    model: _Name,
    as_json: _Json = False,
    html: _Page = None,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _DeviceMap = None,
) -> None:
    """Shows what Insitu takes a model's parts to be, and verifies it in a run of a few tokens.

    Of each standard name it says what it stands for, with the shape of its value in that run, or
    why there is nothing. Then it says what holds: whether residuals add up, heads reassemble,
    attention patterns sum to one and the last residual gives the logits.

    Exits with 0 if all of it holds, with 1 if something differs, and with 2 if the model cannot
    be loaded, or cannot be run.

    **Example:** `insitu check insitu/eiffel`
    """
    kwargs = _given(revision=revision, dtype=dtype, device_map=device_map)
    with _failing(model):
        from insitu.models.checking import check as checked

        report = checked(_opened(model, kwargs), model)
    if as_json:
        typer.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        from insitu.display.report import render

        _print(render(report), html)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def lens(
    model: _Name,
    prompt: _Prompt,
    layers: _Layers = None,
    as_json: _Json = False,
    html: _Html = None,
    png: _Png = None,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _DeviceMap = None,
) -> None:
    """Shows what the model would say if it ended after each of its layers: the logit lens.

    **Example:** `insitu lens insitu/eiffel "The Louvre is in the city of"`
    """
    kwargs = _given(revision=revision, dtype=dtype, device_map=device_map)
    with _failing(model):
        from insitu.methods import logit_lens

        _show(
            logit_lens(_language(model, kwargs), prompt, layers=_numbers(layers)),
            as_json,
            html,
            png,
        )


@app.command()
def patch(
    model: _Name,
    clean: Annotated[str, typer.Argument(help="The prompt whose values are copied.")],
    corrupted: Annotated[str, typer.Argument(help="The prompt that they are put into.")],
    answer: Annotated[str, typer.Option(help="What follows the clean prompt: one token.")],
    instead: Annotated[str, typer.Option(help="What follows the corrupted one: one token.")],
    site: Annotated[str, typer.Option(help="What is copied, by its standard name.")] = (
        "residual_in"
    ),
    by: Annotated[str, typer.Option(help="The grid, such as `layer,position` or `layer,head`.")] = (
        "layer,position"
    ),
    noising: Annotated[bool, typer.Option(help="Copy the other way round.")] = False,
    layers: _Layers = None,
    as_json: _Json = False,
    html: _Html = None,
    png: _Png = None,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _DeviceMap = None,
) -> None:
    """Shows where in the model an answer comes from: activation patching.

    Values of a run on the clean prompt are copied into runs on the corrupted one, one place at a
    time, and the logit difference of the two answers is measured.

    **Example:** `insitu patch insitu/eiffel "The Louvre is in the city of" "The Kremlin is in the
    city of" --answer " Paris" --instead " Moscow"`
    """
    kwargs = _given(revision=revision, dtype=dtype, device_map=device_map)
    with _failing(model):
        from insitu.methods import activation_patching, logit_difference

        opened = _language(model, kwargs)
        result = activation_patching(
            opened,
            clean,
            corrupted,
            logit_difference(_token(opened, answer), _token(opened, instead)),
            sites=site,
            by=tuple(by.split(",")),
            layers=_numbers(layers),
            direction="noising" if noising else "denoising",
        )
        _show(result, as_json, html, png)


@app.command()
def attention(
    model: _Name,
    prompt: _Prompt,
    layers: _Layers = None,
    heads: Annotated[str | None, typer.Option(help="Which heads, likewise.")] = None,
    as_json: _Json = False,
    html: _Html = None,
    png: _Png = None,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _DeviceMap = None,
) -> None:
    """Shows where each head looks.

    **Example:** `insitu attention insitu/eiffel "The Louvre is in the city of" --layers 4`
    """
    kwargs = _given(revision=revision, dtype=dtype, device_map=device_map)
    with _failing(model):
        from insitu.methods import attention_patterns

        opened = _language(model, kwargs)
        with warnings.catch_warnings():  # that patterns take eager attention is no news here
            warnings.simplefilter("ignore", UserWarning)
            result = attention_patterns(
                opened, prompt, layers=_numbers(layers), heads=_numbers(heads)
            )
        _show(result, as_json, html, png)


@app.command()
def steer(
    model: _Name,
    prompt: _Prompt,
    toward: Annotated[list[str], typer.Option(help="A text that has what is wanted. Repeatable.")],
    away: Annotated[list[str], typer.Option(help="A text that does not. Repeatable.")],
    strength: Annotated[
        list[float] | None, typer.Option(help="How strongly. Repeatable; 0 and 1 unless given.")
    ] = None,
    layers: _Layers = None,
    tokens: Annotated[int, typer.Option(help="How many tokens are generated.")] = 20,
    vector: Annotated[Path | None, typer.Option(help="Write the vector to this file.")] = None,
    as_json: _Json = False,
    revision: _Revision = None,
    dtype: _Dtype = None,
    device_map: _DeviceMap = None,
) -> None:
    """Generates with a direction added: from some texts toward others.

    **Example:** `insitu steer insitu/eiffel "The Louvre is in the city of" --toward "Moscow is
    in Russia" --away "Paris is in France" --layers 3`
    """
    kwargs = _given(revision=revision, dtype=dtype, device_map=device_map)
    with _failing(model):
        from insitu.methods import steer as steered
        from insitu.methods import steering_vector

        opened = _language(model, kwargs)
        found = steering_vector(opened, toward, away, layers=_numbers(layers))
        if vector is not None:
            found.save(vector)
        written = steered(
            opened, prompt, found, strength=strength or [0.0, 1.0], max_new_tokens=tokens
        )
        if as_json:
            said = [{"strength": one.strength, "text": one.text} for one in written]
            typer.echo(json.dumps(said, indent=2))
        else:
            for one in written:
                typer.echo(f"{one.strength:>6g}  {one.text!r}")


def _given(**kwargs: Any) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _openers() -> Iterator[Callable[..., Model]]:
    """Ways to open a model by its name, the first that works."""
    from insitu import LanguageModel, Model

    yield LanguageModel
    yield Model.from_pretrained


def _opened(name: str, kwargs: dict[str, Any], load: bool = True) -> Model:
    """A model of any kind, with its weights unless they are not needed."""
    failures: list[Exception] = []
    for opener in _openers():
        try:
            model = opener(name, **kwargs)
            if load:
                model.load()
            return model
        except Exception as error:  # the next one may know more about it
            failures.append(error)
    raise failures[0]


def _language(name: str, kwargs: dict[str, Any]) -> LanguageModel:
    """A language model, with its weights."""
    from insitu import LanguageModel

    model = LanguageModel(name, **kwargs)
    model.load()
    return model


def _numbers(given: str | None) -> list[int] | None:
    """The numbers in "0,5" or "2-4"."""
    if given is None:
        return None
    numbers: list[int] = []
    try:
        for part in given.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is no list of numbers, such as 3, 0,5 or 2-4."
        ) from None
    return numbers


def _token(model: LanguageModel, text: str) -> str:
    """A token as it is written in the middle of a sentence, if it is none as it is given."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) == 1 or text.startswith(" ") else f" {text}"


def _show(result: Result, as_json: bool, html: Path | None, png: Path | None) -> None:
    """Prints a result, or writes it to where it was asked for."""
    if html is not None:
        result.to_html(html)
    if png is not None:
        result.to_png(png)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    elif html is None and png is None:
        _print(result)


def _print(shown: Any, html: Path | None = None) -> None:
    """Prints something, or writes it to a page."""
    from rich.console import Console

    if html is None:
        Console(soft_wrap=False).print(shown)
        return
    console = Console(file=StringIO(), record=True, width=_PAGE)
    console.print(shown)
    console.save_html(str(html))


@contextmanager
def _failing(name: str | None = None) -> Iterator[None]:
    """Says in a line why something cannot be done, and exits."""
    from insitu.graph.errors import InsituError

    try:
        yield
    except typer.BadParameter:
        raise
    except Exception as error:  # whatever a library makes of files that are wrong
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        if not isinstance(error, InsituError):
            said = f"{name!r} cannot be loaded: {said}" if name else said
        typer.secho(said, fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
