"""The command line: `insitu lens`, `insitu patch` and the rest, each a call of a function.

A command prints a table or JSON, or writes a page or a picture and says where. It exits with 0 if
all went well, with 1 if what was checked does not hold, and with 2, and one line that says why, if
it could not be done. How options are read is in `command_options.py`, and what becomes of an answer
in `command_answers.py`. Commands about a server are in `command_server.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from insitu.command_answers import Answer, command_of
from insitu.command_harvest import harvest
from insitu.command_models import Loading, any_model, language_model, token
from insitu.command_options import (
    DeviceMap,
    Dtype,
    Layers,
    Name,
    Positions,
    Prompt,
    Revision,
    numbers_in,
)
from insitu.command_server import keys_app, serve

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def _command(found: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a command of the program of a function that finds an answer."""
    return app.command()(command_of(found))


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
def demo() -> Answer:
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
    return Answer(lens, data, f"{text!r}\nbehind the last block: {shape}\n")


@_command
def tree(
    model: Name,
    depth: Annotated[int | None, typer.Option(help="How deep, all of it unless given.")] = None,
    revision: Revision = None,
) -> Answer:
    """Shows a model's modules, with the standard names beside their own. No weights are loaded.

    **Example:** `insitu tree insitu/eiffel --depth 3`
    """
    loading = {} if revision is None else {"revision": revision}
    shown = any_model(model, loading, load=False).tree(depth)
    return Answer(shown, shown.to_list())


@_command
def check(
    model: Name,
    revision: Revision = None,
    dtype: Dtype = None,
    device_map: DeviceMap = None,
) -> Answer:
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

    # No `--remote`: what holds is computed with the weights.
    given = {"revision": revision, "dtype": dtype, "device_map": device_map}
    loading = {name: one for name, one in given.items() if one is not None}
    report = checked(any_model(model, loading), model)
    return Answer(render(report), {**asdict(report), "ok": report.ok}, ok=report.ok)


@_command
def lens(model: Name, prompt: Prompt, loading: Loading, layers: Layers = None) -> Answer:
    """Shows what the model would say if it ended after each of its layers: the logit lens.

    **Example:** `insitu lens insitu/eiffel "The Louvre is in the city of"`
    """
    from insitu.methods import logit_lens

    return Answer(logit_lens(language_model(model, loading), prompt, layers=numbers_in(layers)))


@_command
def patch(
    model: Name,
    loading: Loading,
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
    normalised: Annotated[
        bool, typer.Option(help="As shares of the way between the prompts, or the metric itself.")
    ] = True,
    layers: Layers = None,
    positions: Positions = None,
) -> Answer:
    """Shows where in the model an answer comes from: activation patching.

    Values of a run on the clean prompt are copied into runs on the corrupted one, one place at a
    time, and the logit difference of the two answers is measured.

    **Example:** `insitu patch insitu/eiffel "The Louvre is in the city of" "The Kremlin is in the
    city of" --answer " Paris" --instead " Moscow"`
    """
    from insitu.methods import activation_patching, logit_difference

    opened = language_model(model, loading)
    result = activation_patching(
        opened,
        clean,
        corrupted,
        logit_difference(token(opened, answer), token(opened, instead)),
        sites=site,
        by=tuple(axis.strip() for axis in by.split(",")),
        layers=numbers_in(layers),
        positions=numbers_in(positions),
        direction="noising" if noising else "denoising",
        normalised=normalised,
    )
    return Answer(result)


@_command
def attention(
    model: Name,
    prompt: Prompt,
    loading: Loading,
    layers: Layers = None,
    heads: Annotated[str | None, typer.Option(help="Which heads, written like layers.")] = None,
) -> Answer:
    """Shows where each head looks.

    **Example:** `insitu attention insitu/eiffel "The Louvre is in the city of" --layers 4`
    """
    from insitu.methods import attention_patterns

    opened = language_model(model, loading)
    with warnings.catch_warnings():  # that patterns take eager attention is no news here
        warnings.simplefilter("ignore", UserWarning)
        result = attention_patterns(
            opened, prompt, layers=numbers_in(layers), heads=numbers_in(heads)
        )
    # In a decoder the first token can only look at itself, which is left out.
    alone = bool((result.at(query=0, key=0).values == 1).all())
    several = len(result.axis("query")) > 1
    return Answer(
        result, printed=result.select(query=slice(1, None)) if alone and several else None
    )


@_command
def steer(
    model: Name,
    prompt: Prompt,
    loading: Loading,
    toward: Annotated[list[str], typer.Option(help="A text that has what is wanted. Repeatable.")],
    away: Annotated[list[str], typer.Option(help="A text that does not. Repeatable.")],
    strength: Annotated[
        list[float] | None, typer.Option(help="How strongly. Repeatable; 0 and 1 unless given.")
    ] = None,
    layers: Layers = None,
    tokens: Annotated[int, typer.Option(help="How many tokens are generated.")] = 20,
    vector: Annotated[Path | None, typer.Option(help="Write the vector to this file.")] = None,
) -> Answer:
    """Generates with a direction added: from some texts toward others.

    **Example:** `insitu steer insitu/eiffel "The Louvre is in the city of" --toward "Moscow is
    in Russia" --away "Paris is in France" --layers 3`
    """
    from insitu.methods import steer as steered
    from insitu.methods import steering_vector

    opened = language_model(model, loading)
    found = steering_vector(opened, toward, away, layers=numbers_in(layers))
    if vector is not None:
        found.save(vector)
    written = steered(
        opened, prompt, found, strengths=strength or [0.0, 1.0], max_new_tokens=tokens
    )
    data = [{"strength": one.strength, "text": one.text} for one in written]
    return Answer(written, data, written=() if vector is None else (vector,))


@_command
def run(
    job: Annotated[str, typer.Argument(help="A file with the bytes of a job.")],
    model: Annotated[str, typer.Option(help="A repo id, a folder, or a bundled model.")],
    loading: Loading,
    out: Annotated[
        Path | None, typer.Option(help="Write the results to this safetensors file.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--check", help="Say what it would give and take, and run nothing.")
    ] = False,
) -> Answer:
    """Runs a job that was recorded elsewhere, and shows what it saves.

    The file is one that `tracer.job.save(path)` has written. It is data and no code, and may be
    anybody's.

    **Example:** `insitu run experiment.job --model insitu/eiffel --out results.safetensors`
    """
    from insitu.display.saved_values import saved_table
    from insitu.engine.job import Job

    received = Job.load(job)
    opened = any_model(model, loading, load=not dry)
    if dry:
        check = opened.check(received)
        found, lines = check.described(received.saves), check.lines()
        data = {"results": [one._asdict() for one in found], **check.numbers()}
        return Answer(saved_table(found, lines), data)
    results = opened.run(received)
    if out is not None:
        results.save(out)
    found = results.described()
    lines = [f"another model: {what}" for what in results.differences]
    data = {"results": [one._asdict() for one in found], "differences": [*results.differences]}
    return Answer(saved_table(found, lines), data, written=() if out is None else (out,))


_command(harvest)
app.command()(serve)
app.add_typer(keys_app, name="keys")
