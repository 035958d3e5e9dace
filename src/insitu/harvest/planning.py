"""`plan`: what a harvest will take, from its first shard of data and a few batches of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from insitu.graph.errors import InsituError, OptionError
from insitu.graph.location import here
from insitu.graph.tracebacks import short_tracebacks
from insitu.harvest.data.ranges import Group, Progress, Range, batches
from insitu.harvest.progress import size
from insitu.harvest.running.metrics import Metric
from insitu.harvest.running.ranges_run import ranges_from
from insitu.harvest.running.rows import rows_of
from insitu.harvest.running.sites import AnySite
from insitu.harvest.running.specifying import Options, Order, ordered, row_bytes
from insitu.models.language_model import LanguageModel

if TYPE_CHECKING:
    from rich.table import Table

_BATCHES = 3  # that are timed, behind one that warms up


@dataclass(frozen=True, slots=True)
class HarvestPlan:
    """What a harvest will take.

    Attributes:
        tokens: how many tokens the model will be given.
        rows: how many rows of activations there will be.
        shards: how many shards.
        bytes: how many bytes on the disk.
        passes: how many forwards.
        operations: how many floating-point operations they take; None if that is not known.
        seconds: how long it will take, by the time that a few of the batches took here.
        exact: whether tokens, rows, bytes and passes are counted, and not reckoned from the first
            shard.
    """

    tokens: int
    rows: int
    shards: int
    bytes: int
    passes: int
    operations: float | None
    seconds: float
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns its numbers by name."""
        return asdict(self)

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("", "exactly" if self.exact else "about")
        for name, said in self._lines():
            table.add_row(name, said)
        return table

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        return "\n".join(f"{name:<24}{about}{said}" for name, said in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        operations = "unknown" if self.operations is None else f"{self.operations:.2e}"
        return [
            ("tokens", f"{self.tokens:,}"),
            ("rows", f"{self.rows:,}"),
            (
                "on the disk",
                f"{size(self.bytes)} in {self.shards:,} shard{'s' * (self.shards != 1)}",
            ),
            ("forwards", f"{self.passes:,}"),
            ("operations", operations),
            ("time on this machine", _duration(self.seconds)),
        ]


@short_tracebacks
def plan(
    model: LanguageModel,
    data: Any,
    sites: AnySite | Sequence[AnySite],
    *,
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
) -> HarvestPlan:
    """Says what a harvest will take, and writes nothing: its arguments are those of `harvest`.

    The data of the first shard is read, and a few of its batches are run.

    Returns:
        What it will take.

    Raises:
        OptionError: as of `harvest`, if the data can be read only once, or if it cannot tell how
            long it is and `tokens` is not given.
        InsituError: as of `harvest`.
    """
    options = Options(
        tokens, dtype, context, pack, reduce, split, column, revision, stream, bos, separator,
        batch_tokens, shard_tokens, max_skipped, metric,
    )  # fmt: skip
    order = ordered(model, data, sites, options)
    if order.documents.once:
        raise OptionError(
            "The data can be read only once, and a plan reads some of it: give a list, a file or "
            "a data set.",
            here(),
        )
    first = next(ranges_from(order, Progress()))
    return _planned(order, first)


def _planned(order: Order, first: Range) -> HarvestPlan:
    told = order.specification
    total = _tokens(order, first)
    lengths = [len(one.ids) for one in first.sequences]
    cut = batches(lengths, told.batch_tokens)
    rows = rows_of(first, told.reduce).count
    seconds, operations, timed = _timed(order, first, cut)
    share = total / first.tokens
    all_rows = rows if first.last else round(rows * share)
    return HarvestPlan(
        tokens=total,
        rows=all_rows,
        shards=1 if first.last else math.ceil(share),
        bytes=all_rows * row_bytes(told),
        passes=len(cut) if first.last else math.ceil(len(cut) * share),
        operations=None if operations is None else operations / timed * total,
        seconds=seconds / timed * total,
        exact=first.last,
    )


def _tokens(order: Order, first: Range) -> int:
    """How many tokens there will be."""
    asked, count = order.specification.tokens, order.documents.count
    if first.last:
        return first.tokens
    # Of the document in which the first shard ends, a part is taken as a whole.
    read = first.stop.document + bool(first.stop.token)
    there = None if count is None else round(first.tokens * count / max(read, 1))
    if asked is None and there is None:
        raise OptionError(
            "The data does not tell how long it is: give `tokens=`, of how many it is planned.",
            here(),
        )
    return min(one for one in (asked, there) if one is not None)


def _timed(order: Order, first: Range, cut: list[list[Group]]) -> tuple[float, float | None, int]:
    """How long some batches of a range take, their operations, and how many tokens they have."""
    step = max(1, len(cut) // _BATCHES)
    chosen = cut[step // 2 :: step][:_BATCHES]
    given = [
        [torch.tensor([first.sequences[place].ids for place in group]) for group in batch]
        for batch in chosen
    ]
    order.taking.run(given[0])
    start = time.perf_counter()
    for groups in given:
        order.taking.run(groups)
    seconds = time.perf_counter() - start
    tokens = sum(group.numel() for groups in given for group in groups)
    try:
        operations = sum(order.taking.operations(groups) for groups in given)
    except InsituError:  # of a model whose forward cannot be looked at without data
        operations = None
    return seconds, operations, tokens


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} seconds"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} hours {rest // 60} minutes" if hours else f"{rest // 60} minutes"
