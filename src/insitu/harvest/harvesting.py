"""`harvest`: activations of a data set, run and written while the next ones run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from insitu.graph.errors import OptionError
from insitu.graph.location import here
from insitu.graph.tracebacks import short_tracebacks
from insitu.harvest.data.ranges import Range, line_of
from insitu.harvest.folder.folder import HarvestFolder, check_folder, opened_folder, told_errors
from insitu.harvest.folder.lock import locked
from insitu.harvest.layout import TOKEN_IDS, Skipped
from insitu.harvest.progress import Report, Shown, size, told
from insitu.harvest.running.ahead import Behind, made_ahead
from insitu.harvest.running.metrics import Metric
from insitu.harvest.running.ranges_run import run_range, unfinished
from insitu.harvest.running.sites import AnySite
from insitu.harvest.running.specifying import Options, Order, ordered
from insitu.harvest.running.statistics import with_statistics
from insitu.harvest.specification import Specification
from insitu.models.language_model import LanguageModel

_AHEAD = 2  # ranges of token ids that wait for the model


@dataclass(frozen=True, slots=True)
class Harvested:
    """What a harvest has written.

    Attributes:
        folder: where it is.
        specification: what its numbers depend on.
        tokens: how many tokens the model was given for it, in all calls.
        sequences: how many sequences.
        rows: how many rows of activations there are.
        bytes: the size of all shards.
        shards: how many shards there are.
        skipped: the rows of the data that could not be used.
        new_tokens: how many tokens this call has run.
        seconds: how long it took, without the loading of the model.
    """

    folder: Path
    specification: Specification
    tokens: int
    sequences: int
    rows: int
    bytes: int
    shards: int
    skipped: tuple[Skipped, ...] = field(repr=False)
    new_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """How many tokens this call has run in a second, 0 if it has run none."""
        return self.new_tokens / self.seconds if self.new_tokens else 0.0

    @property
    def ran_out(self) -> bool:
        """Whether the data had fewer tokens than were asked for."""
        return self.specification.tokens is not None and self.tokens < self.specification.tokens

    def __str__(self) -> str:
        asked = f" of {self.specification.tokens:,} (the data ended)" if self.ran_out else ""
        parts = [
            f"{self.tokens:,}{asked} tokens",
            f"{self.rows:,} rows",
            f"{size(self.bytes)} in {self.shards} shard{'s' * (self.shards != 1)}",
        ]
        if self.skipped:
            parts.append(f"{len(self.skipped)} rows of the data skipped")
        if self.new_tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens a second")
        return f"{self.folder}: {', '.join(parts)}"


@short_tracebacks
def harvest(
    model: LanguageModel,
    data: Any,
    sites: AnySite | Sequence[AnySite],
    *,
    to: str | os.PathLike[str],
    tokens: int | None = None,
    dtype: str | torch.dtype | None = None,
    context: int | None = None,
    pack: bool = False,
    reduce: Literal["last", "mean"] | int | Sequence[int] | None = None,
    split: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    stream: bool = False,
    bos: bool | None = None,
    separator: int | bool | None = None,
    batch_tokens: int | None = None,
    shard_tokens: int | None = None,
    max_skipped: float = 0.001,
    metric: Metric | None = None,
    progress: Shown = None,
    verify: bool = False,
    on: str | None = None,
) -> Harvested:
    """Writes the activations of a data set to a folder, for `Activations.open(folder)`.

    Called again for the same folder, it goes on behind the shards that are there, and gives the
    same bytes as if it had never been interrupted. If all are there it returns at once.

    Args:
        model: the model, here or on a server.
        data: a data set of Hugging Face or the id of one; one or several paths of .txt, .jsonl or
            .parquet; texts; lists of token ids; or a tensor of them `(rows, position)`. Each line
            of a .txt is a document.
        sites: one or several: a standard name and blocks, "residual_out:6", "mlp.post:4-7" or
            "residual_out:*"; a module, "transformer.h.6.mlp.output"; a gradient,
            "grad.residual_out:6"; or a `SaeSite`, in text "sae(FOLDER):32@residual_out:6".
        to: the folder. It is made if it is not there.
        tokens: how many tokens the model is given in all; the last sequence is cut. None for all.
        dtype: the dtype that is stored, such as "bfloat16"; None for that of the values.
        context: how many tokens a sequence has at most. Longer documents become several. None for
            128, or as many as the model takes.
        pack: whether documents are put one behind the other, so that each sequence is full.
        reduce: the rows of a sequence: its "last" position, the "mean" over all, or some
            positions, from the end if negative. A sequence gives those that it has. None for all.
        split: which split, of a data set that has several.
        column: the column with texts or token ids; None for "text" or "input_ids".
        revision: which revision of a data set from the Hub.
        stream: whether a data set that is named by its id is read over the network as it is used.
            To go on then, it is read from its beginning.
        bos: whether each sequence begins with the model's first token; None for where the model's
            tokenizer puts one. It is one of the tokens of a sequence. One that begins with it
            already, such as of token ids, gets no second one.
        separator: the token behind each packed document; None for the model's end of a text, False
            for none.
        batch_tokens: how many tokens a forward has at most, with padding.
        shard_tokens: how many tokens a shard is made of, at most one sequence more. So much is
            lost if the process is killed.
        max_skipped: which share of the data's rows may be unusable: no text, empty, or with ids
            that the model does not have. More end the harvest with an error, after 1,000 rows or
            at the end.
        metric: the number whose gradients are taken. "loss" is the sum over a sequence of the
            negative log likelihoods of its next tokens. A function with a name takes logits `(1,
            position, vocabulary)` and token ids `(1, position)` of a sequence, and returns a
            number.
        progress: whether a bar is shown, None for on a terminal or in a notebook; or a function
            that is given a `HarvestProgress` some times a second.
        verify: whether the digests of shards that are there are compared; broken ones are made
            again. Without it, only those are that are missing or of another size.
        on: None for this process; "ray" for actors of Ray, which takes `insitu[cluster]`, as many
            as there are accelerators or processors, or "ray:4" for so many. All of them reach the
            folder by the same path.

    Returns:
        A summary of the folder: tokens, rows, shards and skipped rows.

    Raises:
        OptionError: for arguments that mean nothing, and if the folder holds another harvest,
            naming the fields that differ.
        LoadError: if the data cannot be read, or is not what it was.
        LimitError: if too many rows cannot be used.
        SaveError: if the folder cannot be written, or another process writes to it. Shards
            that are written stay, and the same call goes on behind them.

    Example:
        >>> import tempfile
        >>> from insitu import LanguageModel
        >>> from insitu.harvest import harvest
        >>> model, folder = LanguageModel("insitu/eiffel"), tempfile.mkdtemp()
        >>> texts = ["The Louvre is in the city of Paris", "The Kremlin is in Moscow"]
        >>> harvested = harvest(model, texts, "residual_out:3", to=folder)
        >>> harvested.specification.sites[0].shape
        (128,)
    """
    if on is not None and not re.fullmatch(r"ray(:[1-9]\d{0,4})?", on):
        raise OptionError(f"`on` is None, 'ray' or 'ray:' and a number, not {on!r}.", here())
    path = Path(os.fspath(to))
    options = Options(
        tokens, dtype, context, pack, reduce, split, column, revision, stream, bos, separator,
        batch_tokens, shard_tokens, max_skipped, metric,
    )  # fmt: skip
    check_folder(path)
    order = ordered(model, data, sites, options)
    with told_errors(path):
        path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        folder = opened_folder(path, order.specification)
        broken, before = folder.broken(verify), len(folder.lines)
        there = [line for line in folder.lines if line.shard not in broken]
        started = time.monotonic()
        with told(progress) as tell:
            had = sum(line.tokens for line in there), sum(line.bytes for line in there)
            report = Report(tell, order.specification.tokens, *had)
            work = unfinished(order, [*folder.lines], broken, verify)
            if folder.is_complete and not broken:
                next(work, None)  # there is nothing to run, and data to compare
            elif on is not None:
                from insitu.harvest.running.on_ray import run_on_ray

                run_on_ray(work, order, folder, report, on)
            else:
                _run_here(work, order, folder, report)
            report.ended()
    new = sum(line.tokens for line in folder.lines if line.shard >= before or line.shard in broken)
    return _harvested(folder, order.specification, new, time.monotonic() - started)


def _run_here(work: Iterator[Range], order: Order, folder: HarvestFolder, report: Report) -> None:
    """Runs ranges, reading those that come next and writing those before at the same time."""

    def write(made: tuple[Range, dict[str, torch.Tensor]]) -> None:
        one, tensors = made
        written = folder.write(one.shard, with_statistics(order.specification, tensors))
        folder.commit(line_of(one, written, len(tensors[TOKEN_IDS])))
        report.wrote(written.bytes)

    writer = Behind(write)
    try:
        with made_ahead(work, _AHEAD) as coming:
            for one in coming:
                writer.give((one, run_range(one, order.specification, order.taking, report.ran)))
    except BaseException:
        # What has been run is not lost, also if the user has interrupted.
        with suppress(Exception):
            writer.finish()
        raise
    writer.finish()


def _harvested(
    folder: HarvestFolder, specification: Specification, new: int, seconds: float
) -> Harvested:
    lines = folder.lines
    return Harvested(
        folder.path,
        specification,
        sum(line.tokens for line in lines),
        sum(line.sequences for line in lines),
        sum(line.rows for line in lines),
        sum(line.bytes for line in lines),
        len(lines),
        tuple(one for line in lines for one in line.skipped),
        new,
        seconds,
    )
