"""`live`: batches of a model's activations on a data set, without a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from insitu.graph.errors import OptionError, nearest
from insitu.graph.location import here
from insitu.harvest.data.ranges import Progress
from insitu.harvest.reading.batch_parts import Where
from insitu.harvest.reading.live import LiveBatches, RangeTensors
from insitu.harvest.running.ranges_run import ranges_from, run_range
from insitu.harvest.running.sites import AnySite
from insitu.harvest.running.specifying import Options, ordered
from insitu.models.language_model import LanguageModel


def live(
    model: LanguageModel,
    data: Any,
    sites: AnySite | Sequence[AnySite],
    size: int,
    *,
    shuffle: bool = True,
    seed: int = 0,
    buffer: int = 65_536,
    ahead: int = 4,
    where: Where | None = None,
    drop_last: bool = False,
    **options: Any,
) -> LiveBatches:
    """Returns batches of a model that runs meanwhile, without touching the disk.

    They are those of `Activations.batches`, of the same rows as `harvest` would write. A thread
    runs the model ahead; it ends with the loop, and with `close`. Each epoch runs the model anew.

    Args:
        model: the model.
        data: as for `harvest`. Data that can be read only once gives one epoch.
        sites: as for `harvest`.
        size: how many rows a batch has.
        shuffle: whether rows are mixed.
        seed: what the order is drawn from, with the epoch.
        buffer: how many rows are held and mixed with each other.
        ahead: how many batches are made ready ahead.
        where: as for `Activations.batches`.
        drop_last: as for `Activations.batches`.
        options: other arguments of `harvest` that change the rows, such as `context=`,
            `tokens=` and `dtype=`.

    Raises:
        OptionError: if an option has no meaning.
        LoadError: if the data cannot be read.

    Example:
        >>> from insitu import LanguageModel
        >>> from insitu.harvest import live
        >>> model = LanguageModel("insitu/eiffel")
        >>> texts = ["The Louvre is in the city of Paris", "The Kremlin is in Moscow"]
        >>> with live(model, texts, "residual_out:3", size=4) as batches:
        ...     next(iter(batches))["residual_out:3"].shape
        torch.Size([4, 128])
    """
    known = Options.__dataclass_fields__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise OptionError(f"There is no option {unknown[0]!r}{nearest(unknown[0], known)}.", here())
    # A range is what is put into the buffer at once.
    options.setdefault("shard_tokens", max(min(buffer // 4, 16_384), 1))
    order = ordered(model, data, sites, Options(**options))

    def ranges() -> Iterator[RangeTensors]:
        told, taking = order.specification, order.taking
        return (run_range(one, told, taking) for one in ranges_from(order, Progress()))

    mixing: Any = {"shuffle": shuffle, "seed": seed, "buffer": buffer, "ahead": ahead}
    return LiveBatches(ranges, size, **mixing, where=where, drop_last=drop_last)
