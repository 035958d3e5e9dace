"""Running ranges: the forwards of one range, and the tensors of its shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from insitu.graph.errors import ExecutionError
from insitu.graph.location import here
from insitu.harvest.data.documents import Documents
from insitu.harvest.data.ranges import Progress, Range, batches, ranges
from insitu.harvest.data.sequences import Sequence, changed, sequences
from insitu.harvest.data.tokenising import tokenised
from insitu.harvest.layout import INDICES, VALUES, Line, Place, Skipped
from insitu.harvest.running.batch import Taking
from insitu.harvest.running.rows import rows_of
from insitu.harvest.running.specifying import Order
from insitu.harvest.specification import Specification


def run_range(
    one: Range,
    told: Specification,
    taking: Taking,
    ran: Callable[[int], object] = lambda tokens: None,
) -> dict[str, torch.Tensor]:
    """Runs a range, and returns the tensors of its shard, without statistics.

    Args:
        one: the range.
        told: the specification of the harvest.
        taking: runs a forward and keeps its values.
        ran: is told of each batch how many tokens it had.
    """
    rows = rows_of(one, told.reduce)
    tensors = dict(rows.tensors)
    for site in told.sites:
        dtype = getattr(torch, site.dtype)
        if site.features is None:
            tensors[site.label] = torch.empty(rows.count, *site.shape, dtype=dtype)
        else:
            tensors[f"{site.label}/{VALUES}"] = torch.empty(rows.count, *site.shape, dtype=dtype)
            tensors[f"{site.label}/{INDICES}"] = torch.empty(
                rows.count, *site.shape, dtype=torch.int32
            )
    lengths = [len(each.ids) for each in one.sequences]
    for batch in batches(lengths, told.batch_tokens):
        given = [torch.tensor([one.sequences[place].ids for place in group]) for group in batch]
        for group, kept in zip(batch, taking.run(given), strict=True):
            for name, values in kept.items():
                for place, value in zip(group, values, strict=True):
                    start = rows.starts[place]
                    tensors[name][start : start + len(value)] = value
        ran(sum(ids.numel() for ids in given))
    _check_range(told, tensors)
    return tensors


def ranges_from(
    order: Order, start: Progress, documents: Documents | None = None
) -> Iterator[Range]:
    """Yields the ranges of a harvest from a place on.

    Args:
        order: the harvest.
        start: where the first of them begins.
        documents: the data, None for that of the harvest.
    """
    told, data = order.specification, documents or order.documents

    def read(place: Place) -> Iterator[Sequence | Skipped]:
        found = tokenised(data.read(place.document), place.document, order.tokenising)
        return sequences(found, order.cutting, place)

    return ranges(read, start, told.shard_tokens, told.tokens, order.max_skipped)


def unfinished(order: Order, lines: list[Line], broken: list[int], verify: bool) -> Iterator[Range]:
    """Yields the ranges that are still to be run: broken shards, and what comes behind the last.

    Where the data cannot tell beforehand whether it is still the same, ranges that are there are
    cut again and compared: the first and last. Data that is read from its beginning is compared
    whole, or in its first range if nothing is to be run.

    Args:
        order: the harvest.
        lines: the shards that are there.
        broken: the numbers of those that have to be made again.
        verify: whether all are compared.

    Raises:
        LoadError: if the data has changed.
    """
    pinned = order.documents.specification.digest is not None
    complete = bool(lines) and lines[-1].last
    if not order.documents.jumps:
        if not lines:
            yield from ranges_from(order, Progress())
        elif broken or verify or not complete:
            yield from _read_again(order, lines, broken)
        else:
            _check_same(next(ranges_from(order, Progress())), lines[0])
        return
    looked_at = {*broken}
    if not pinned:
        looked_at |= {*range(len(lines))} if verify else {0, len(lines) - 1} & {*range(len(lines))}
    now = Progress()
    for line in lines:
        if line.shard in looked_at:
            again = next(ranges_from(order, now))
            _check_same(again, line)
            if line.shard in broken:
                yield again
        now = now.behind(line)
    if not complete:
        yield from ranges_from(order, now)


def _read_again(order: Order, lines: list[Line], broken: list[int]) -> Iterator[Range]:
    """The ranges of data that can only be read from its beginning."""
    shard = -1
    for one in ranges_from(order, Progress()):
        shard = one.shard
        if shard >= len(lines):
            yield one
            continue
        _check_same(one, lines[shard])
        if shard in broken:
            yield one
    if shard < len(lines) - 1:
        raise changed(lines[-1].start.document)


def _check_same(again: Range, line: Line) -> None:
    """Raises if a range is not the one that a shard was made of."""
    if (again.digest(), again.last, again.stop) != (line.source, line.last, line.stop):
        raise changed(line.start.document)


def _check_range(told: Specification, tensors: dict[str, torch.Tensor]) -> None:
    """Raises if values were too large for the dtype that they are stored in."""
    for site in told.sites:
        # What is in float16 already was not made smaller; features are made in another dtype.
        rounded = site.features is not None or site.model_dtype != "float16"
        if site.dtype != "float16" or not rounded:
            continue
        values = tensors[site.label if site.features is None else f"{site.label}/{VALUES}"]
        if bool(values.isinf().any()):
            raise ExecutionError(
                f"Values of {site.label!r} are larger than float16 can hold: write "
                "`dtype='bfloat16'`.",
                here(),
            )
