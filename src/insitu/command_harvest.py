"""`insitu harvest`: activations of a data set, into a folder.

Nothing of harvests is imported before the command runs.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from insitu.command_answers import Answer
from insitu.command_models import language_model
from insitu.command_options import DeviceMap, Name, Remote

_SHOWN = 20  # skipped rows that are printed
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


def harvest(
    model: Name,
    data: Annotated[
        str, typer.Argument(help="The id of a data set, or a .txt, .jsonl or .parquet.")
    ],
    sites: Annotated[
        str,
        typer.Option(help="Which activations, such as `residual_out:6,mlp.post:4-7`."),
    ],
    to: Annotated[str | None, typer.Option(help="The folder. With `--plan` none is needed.")] = (
        None
    ),
    tokens: Annotated[
        str | None, typer.Option(help="How many tokens, such as `10M`; all unless given.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype that is stored, unless as the model's.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="How many tokens a sequence has at most, 128 unless given.")
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Put documents one behind the other.")
    ] = False,
    reduce: Annotated[
        str | None, typer.Option(help="Keep `last`, `mean`, or positions such as `-1,-2`.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which split of the data set.")] = None,
    column: Annotated[str | None, typer.Option(help="Which column has the texts.")] = None,
    revision: Annotated[str | None, typer.Option(help="Which revision of the data set.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read the data set over the network as it is used.")
    ] = False,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="Begin each sequence with that token.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="What gradients are of: `loss`.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="How many a forward has.")] = None,
    shard_tokens: Annotated[int | None, typer.Option(help="How many a shard is made of.")] = None,
    max_skipped: Annotated[
        float, typer.Option(help="Which share of the rows may be unusable.")
    ] = 0.001,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it will take, and write nothing.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the digests of what is there.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    on: Annotated[str | None, typer.Option(help="`ray` for actors of Ray.")] = None,
    model_revision: Annotated[
        str | None, typer.Option(help="Which revision of the model's repository.")
    ] = None,
    model_dtype: Annotated[
        str | None, typer.Option(help="The dtype that the model is loaded in, or `auto`.")
    ] = None,
    device_map: DeviceMap = None,
    remote: Remote = None,
) -> Answer:
    """Writes the activations of a data set to a folder. The same command goes on with it.

    The folder is read with `insitu.harvest.Activations.open(FOLDER)`.

    **Example:** `insitu harvest insitu/eiffel prompts.txt --sites residual_out:3 --to activations`
    """
    from insitu.graph.errors import OptionError
    from insitu.harvest import harvest as harvested
    from insitu.harvest import plan as planned
    from insitu.harvest.running.sites import split_sites

    if to is None and not plan:
        raise OptionError("Name the folder that activations are written to: `--to FOLDER`.")
    options: dict[str, Any] = {
        "tokens": None if tokens is None else count_in(tokens),
        "dtype": dtype, "context": context, "pack": pack, "reduce": _reduction(reduce),
        "split": split, "column": column, "revision": revision, "stream": stream, "bos": bos,
        "metric": metric, "batch_tokens": batch_tokens, "shard_tokens": shard_tokens,
        "max_skipped": max_skipped,
    }  # fmt: skip
    loading = {
        "revision": model_revision, "dtype": model_dtype, "device_map": device_map, "remote": remote
    }  # fmt: skip
    given = {name: one for name, one in loading.items() if one is not None}
    opened = language_model(model, given)
    if plan:
        found = planned(opened, data, split_sites(sites), **options)
        return Answer(found, found.to_dict())
    assert to is not None
    try:
        made = harvested(
            opened, data, split_sites(sites), to=to, **options,
            verify=verify, on=on, progress=False if quiet else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        said = f"Interrupted. What was run is in '{to}': the same command goes on behind it."
        typer.secho(said, fg=typer.colors.YELLOW, err=True)
        raise
    skipped = [{"document": one.document, "reason": one.reason} for one in made.skipped]
    numbers = {
        "tokens": made.tokens, "sequences": made.sequences, "rows": made.rows,
        "bytes": made.bytes, "shards": made.shards, "new_tokens": made.new_tokens,
        "seconds": made.seconds, "tokens_per_second": made.tokens_per_second,
        "ran_out": made.ran_out,
    }  # fmt: skip
    lines = [
        str(made),
        *(f"skipped row {one['document']}: {one['reason']}" for one in skipped[:20]),
    ]
    if len(skipped) > 20:
        lines.append(f"and {len(skipped) - 20} more: see manifest.jsonl")
    return Answer("\n".join(lines), {"folder": to, **numbers, "skipped": skipped})


def count_in(given: str) -> int:
    """Returns the number in "10M", "250K" or "4096".

    Args:
        given: what was written behind an option.

    Raises:
        typer.BadParameter: if it is no such number.
    """
    found = re.fullmatch(r"\s*([\d_]{1,15})(\.\d{1,9})?\s*([KMBG]?)\s*", given.upper())
    number = 0.0
    if found and found[1].strip("_"):
        number = float(f"{found[1].replace('_', '')}{found[2] or ''}") * _UNITS[found[3]]
    if number < 1 or number != int(number):
        raise typer.BadParameter(f"{given!r} is no number of tokens, such as 4096, 250K or 10M.")
    return int(number)


def _reduction(given: str | None) -> Any:
    if given is None or given in ("last", "mean"):
        return given
    try:
        return tuple(int(one) for one in given.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{given!r} is not `last`, `mean` or positions such as `-1,-2`."
        ) from None
