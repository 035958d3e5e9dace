"""The command line: `insitu lens`, `insitu patch` and the rest, each a call of a function.

A command prints a table or JSON, or writes a page or a picture and says where. It exits with 0 if
all went well, with 1 if what was checked does not hold, and with 2, and one line that says why, if
it could not be done. How options are read is in `command_options.py`.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from insitu.command_options import (
    DeviceMap,
    Dtype,
    Html,
    Json,
    Layers,
    Name,
    Picture,
    Positions,
    Prompt,
    Revision,
    as_options,
    check_dtype,
    check_files,
    numbers_in,
)

if TYPE_CHECKING:
    from insitu.models.language_model import LanguageModel
    from insitu.models.model import Model

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)

_AnyModel = TypeVar("_AnyModel", bound="Model")
_Loading = dict[str, Any]
"""How a model is loaded: what was given of the options that every command has which loads one."""

_LOADING = {"revision": Revision, "dtype": Dtype, "device_map": DeviceMap}
_WRITING = {"as_json": Json, "html": Html, "picture": Picture}


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command found.

    Attributes:
        shown: a result, or what rich can print.
        data: the same for JSON; of a result, None for its own.
        said: what is printed before it, also where it is written to a file.
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


def _command(found: Callable[..., _Answer]) -> Callable[..., None]:
    """Makes a command of a function, with the options that say where its answer goes.

    If the function has a parameter `loading` the command has those of how a model is loaded.
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
            said = as_options(_line(error), [*own, *added])
            typer.secho(said, fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None
        raise typer.Exit(0 if answer.ok else 1)

    parameters = [*own.values()]
    for name, annotation in added.items():
        default = False if annotation is Json else None
        kind = Parameter.KEYWORD_ONLY
        parameters.append(Parameter(name, kind, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return app.command()(command)


def _write(answer: _Answer, as_json: bool, html: Path | None, picture: Path | None) -> None:
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


def _version(wanted: bool) -> None:
    if wanted:
        from insitu import __version__

        typer.echo(f"insitu {__version__}")
        raise typer.Exit


@app.callback()
def insitu(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which it is.")
    ] = False,
) -> None:
    """Opens up a neural network while it runs."""


@_command
def demo() -> _Answer:
    """Runs the demo on the model that comes with the package: a fact, and where it is recalled.

    **Example:** `insitu demo`
    """
    from insitu import LanguageModel
    from insitu.methods import logit_lens

    prompt = "The Eiffel Tower is in the city of"
    model = LanguageModel("insitu/eiffel", device_map="cpu")
    with model.generate(prompt, max_new_tokens=1) as generator:
        hidden_states = model.transformer.h[-1].output[0].save()
    text, shape = model.tokenizer.decode(generator.output[0]), tuple(hidden_states.value.shape)
    lens = logit_lens(model, prompt)
    data = {"text": text, "hidden_states": shape, "lens": lens.to_dict()}
    return _Answer(lens, data, f"{text!r}\nbehind the last block: {shape}\n")


@_command
def tree(
    model: Name,
    depth: Annotated[int | None, typer.Option(help="How deep, all of it unless given.")] = None,
    revision: Revision = None,
) -> _Answer:
    """Shows a model's modules, with the standard names beside their own. No weights are loaded.

    **Example:** `insitu tree insitu/eiffel --depth 3`
    """
    loading = {} if revision is None else {"revision": revision}
    shown = _opened(model, loading, load=False).tree(depth)
    return _Answer(shown, shown.to_list())


@_command
def check(model: Name, loading: _Loading) -> _Answer:
    """Shows what Insitu takes a model's parts to be, and verifies it in a run of a few tokens.

    Of each standard name it says what it stands for, with the shape of its value in that run, or
    why there is nothing. Then it says what holds: whether residuals add up, heads reassemble,
    attention patterns sum to one and the last residual gives the logits.

    Exits with 0 if all of it holds, with 1 if something differs, and with 2 if the model cannot
    be loaded, or cannot be run.

    **Example:** `insitu check insitu/eiffel`
    """
    from insitu.display.report import render
    from insitu.models.checking import check as checked

    report = checked(_opened(model, loading), model)
    return _Answer(render(report), {**asdict(report), "ok": report.ok}, ok=report.ok)


@_command
def lens(model: Name, prompt: Prompt, loading: _Loading, layers: Layers = None) -> _Answer:
    """Shows what the model would say if it ended after each of its layers: the logit lens.

    **Example:** `insitu lens insitu/eiffel "The Louvre is in the city of"`
    """
    from insitu.methods import logit_lens

    return _Answer(logit_lens(_language(model, loading), prompt, layers=numbers_in(layers)))


@_command
def patch(
    model: Name,
    loading: _Loading,
    clean: Annotated[str, typer.Argument(help="The prompt whose values are copied.")],
    corrupted: Annotated[str, typer.Argument(help="The prompt that they are put into.")],
    answer: Annotated[str, typer.Option(help="What follows the clean prompt: one token.")],
    instead: Annotated[str, typer.Option(help="What follows the corrupted one: one token.")],
    site: Annotated[
        str | None,
        typer.Option(help="What is copied, by its standard name: residual_out unless given."),
    ] = None,
    by: Annotated[str, typer.Option(help="The grid, such as `layer,position` or `layer,head`.")] = (
        "layer,position"
    ),
    noising: Annotated[bool, typer.Option(help="Copy the other way round.")] = False,
    layers: Layers = None,
    positions: Positions = None,
) -> _Answer:
    """Shows where in the model an answer comes from: activation patching.

    Values of a run on the clean prompt are copied into runs on the corrupted one, one place at a
    time, and the logit difference of the two answers is measured.

    **Example:** `insitu patch insitu/eiffel "The Louvre is in the city of" "The Kremlin is in the
    city of" --answer " Paris" --instead " Moscow"`
    """
    from insitu.methods import activation_patching, logit_difference

    opened = _language(model, loading)
    result = activation_patching(
        opened,
        clean,
        corrupted,
        logit_difference(_token(opened, answer), _token(opened, instead)),
        sites=site,
        by=tuple(by.split(",")),
        layers=numbers_in(layers),
        positions=numbers_in(positions),
        direction="noising" if noising else "denoising",
    )
    return _Answer(result)


@_command
def attention(
    model: Name,
    prompt: Prompt,
    loading: _Loading,
    layers: Layers = None,
    heads: Annotated[str | None, typer.Option(help="Which heads, written like layers.")] = None,
) -> _Answer:
    """Shows where each head looks.

    **Example:** `insitu attention insitu/eiffel "The Louvre is in the city of" --layers 4`
    """
    from insitu.methods import attention_patterns

    opened = _language(model, loading)
    with warnings.catch_warnings():  # that patterns take eager attention is no news here
        warnings.simplefilter("ignore", UserWarning)
        result = attention_patterns(
            opened, prompt, layers=numbers_in(layers), heads=numbers_in(heads)
        )
    queries = len(result.axis("query"))
    # The first token can only look at itself.
    return _Answer(result, printed=result.select(query=slice(1, None)) if queries > 1 else None)


@_command
def steer(
    model: Name,
    prompt: Prompt,
    loading: _Loading,
    toward: Annotated[list[str], typer.Option(help="A text that has what is wanted. Repeatable.")],
    away: Annotated[list[str], typer.Option(help="A text that does not. Repeatable.")],
    strength: Annotated[
        list[float] | None, typer.Option(help="How strongly. Repeatable; 0 and 1 unless given.")
    ] = None,
    layers: Layers = None,
    tokens: Annotated[int, typer.Option(help="How many tokens are generated.")] = 20,
    vector: Annotated[Path | None, typer.Option(help="Write the vector to this file.")] = None,
) -> _Answer:
    """Generates with a direction added: from some texts toward others.

    **Example:** `insitu steer insitu/eiffel "The Louvre is in the city of" --toward "Moscow is
    in Russia" --away "Paris is in France" --layers 3`
    """
    from insitu.methods import steer as steered
    from insitu.methods import steering_vector

    opened = _language(model, loading)
    found = steering_vector(opened, toward, away, layers=numbers_in(layers))
    if vector is not None:
        found.save(vector)
    written = steered(opened, prompt, found, strength=strength or [0.0, 1.0], max_new_tokens=tokens)
    data = [{"strength": one.strength, "text": one.text} for one in written]
    return _Answer(written, data, written=() if vector is None else (vector,))


@_command
def run(
    job: Annotated[str, typer.Argument(help="A file with the bytes of a job.")],
    model: Annotated[str, typer.Option(help="A repo id, a folder, or a bundled model.")],
    loading: _Loading,
    out: Annotated[
        Path | None, typer.Option(help="Write the results to this safetensors file.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--check", help="Say what it would give and take, and run nothing.")
    ] = False,
) -> _Answer:
    """Runs a job that was recorded elsewhere, and shows what it saves.

    The file is one that `tracer.job.save(path)` has written. It is data and no code, and may be
    anybody's.

    **Example:** `insitu run experiment.job --model insitu/eiffel --out results.safetensors`
    """
    from insitu.display.saved_values import saved_table
    from insitu.engine.job import Job

    received = Job.load(job)
    opened = _opened(model, loading, load=not dry)
    if dry:
        check = opened.check(received)
        found, lines = check.described(received.saves), check.lines()
        data = {"results": [one._asdict() for one in found], **check.numbers()}
        return _Answer(saved_table(found, lines), data)
    results = opened.run(received)
    if out is not None:
        results.save(out)
    found = results.described()
    lines = [f"another model: {what}" for what in results.differences]
    data = {"results": [one._asdict() for one in found], "differences": [*results.differences]}
    return _Answer(saved_table(found, lines), data, written=() if out is None else (out,))


def _language(name: str, loading: _Loading) -> LanguageModel:
    """A language model, with its weights."""
    from insitu import LanguageModel

    return _loaded(LanguageModel, name, loading)


def _opened(name: str, loading: _Loading, load: bool = True) -> Model:
    """A model of any kind, with its weights unless they are not needed."""
    from insitu import LanguageModel, Model
    from insitu.graph.errors import InsituError

    try:
        return _loaded(LanguageModel, name, loading, load)
    except InsituError as error:
        try:
            return _loaded(Model.from_pretrained, name, loading, load)
        except InsituError:
            raise error from None


def _loaded(
    opener: Callable[..., _AnyModel], name: str, loading: _Loading, load: bool = True
) -> _AnyModel:
    """What opens it as a model, with an error that says which model it was."""
    from insitu.graph.errors import InsituError, LoadError

    check_dtype(loading.get("dtype"))
    try:
        model = opener(name, **loading)
        if load:
            model.load()
    except InsituError:
        raise
    except Exception as error:  # whatever a library makes of files that are wrong
        raise LoadError(f"{name!r} cannot be loaded: {_line(error)}") from error
    return model


def _token(model: LanguageModel, text: str) -> str:
    """A token as it is written in the middle of a sentence, if it is none as it is given."""
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    return text if len(ids) == 1 or text.startswith(" ") else f" {text}"


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
